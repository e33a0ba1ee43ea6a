"""The name of this program here: `grpo-ray` where the shell finds it, else the path of the script."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

COMMANDS = (
    *(
        "train",
        "sft",
        "sample",
        "pipeline",
        "dpo",
        "reward-model",
        "resume",
        "eval",
        "check",
        "report",
        "replay",
        "decontaminate",
    ),
    *("judge-pairs", "smoke", "episodes", "pretrained", "submit", "status", "logs", "stop", "scale"),
)
_CALL = re.compile(rf"\bgrpo-ray (?=(?:{'|'.join(COMMANDS)}|--)\b)")


def program() -> str:
    """The program's name as a shell in the current folder accepts it."""
    beside = Path(sys.executable).with_name("grpo-ray")
    found = shutil.which("grpo-ray")
    if found is not None and (not beside.exists() or os.path.realpath(found) == os.path.realpath(beside)):
        return "grpo-ray"
    if not beside.exists():
        return f"{sys.executable} -m launch"
    try:
        return str(beside.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(beside)


def runnable(text: str) -> str:
    """`text` with the commands in it as they can be typed here."""
    name = program()
    return text if name == "grpo-ray" else _CALL.sub(lambda _: f"{name} ", text)
