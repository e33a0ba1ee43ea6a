"""Every command interrupted in each second of its start: 130 or 143, one line, no traceback, no process, no half-made run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.end_to_end.runs import LIMIT_S, RECIPE, environment

EVERY_S = {"train": 1.0}
OTHERS_S = 3.0
UNDER_WAY = re.compile(r"^(step +1/|finished after|ok  )", re.MULTILINE)
"""What a command prints when its start is over."""
SFT = {
    "model": RECIPE["model"],
    "data": {"train": {"path": "rows.jsonl"}},
    "num_steps": 2,
    "examples_per_step": 4,
    "max_length": 64,
    "learner": {"num_cpus": 0.5, "micro_batch_tokens": 2048},
}
PAIRS = SFT | {"data": {"train": {"path": "pairs.jsonl"}}, "dpo": {}}
STAGES = {"stages": {"base": {"kind": "sft", "config": SFT}}}
COMMANDS = {
    "train": ["train", "tiny.yaml", "name=r"],
    "sft": ["sft", "sft.yaml", "name=r"],
    "dpo": ["dpo", "dpo.yaml", "name=r"],
    "sample": ["sample", "tiny.yaml", "name=r"],
    "eval": ["eval", "tiny.yaml"],
    "pipeline": ["pipeline", "stages.yaml", "name=r"],
    "check": ["check", "tiny.yaml"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, recipe in (("tiny", RECIPE), ("sft", SFT), ("dpo", PAIRS), ("stages", STAGES)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"{i} + 1 =", "chosen": str(i + 1), "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("command", "number"), [*((name, signal.SIGINT) for name in COMMANDS), ("train", signal.SIGTERM)]
)
def test_a_start_can_be_interrupted_at_any_second(folder: Path, command: str, number: int) -> None:
    every_s = EVERY_S.get(command, OTHERS_S)
    after_s = every_s
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "launch", *COMMANDS[command]],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # As a shell's background job the test may have been told to ignore it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            time.sleep(after_s)
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.send_signal(number)
            asked = time.monotonic()
            output, _ = process.communicate(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if UNDER_WAY.search(output):
            return
        name = signal.Signals(number).name
        assert process.returncode == 128 + number, (after_s, output)
        assert time.monotonic() - asked < 10, (after_s, output)
        assert "Traceback" not in output, after_s
        assert output.splitlines()[-1].startswith(f"{name}: "), (after_s, output)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == [], after_s
        assert not (folder / "runs" / "r" / "report.html").exists()
        assert "report " not in output
        if command in ("train", "sft", "dpo"):
            left = folder / "runs" / "r"
            assert not left.exists() or (left / "checkpoints").is_dir() or [p.name for p in left.iterdir()] == ["logs"]
            if (left / "checkpoints").is_dir():
                # There is one at the beginning: then that is what the line is about.
                assert "grpo-ray resume runs/r" in output
                return
        after_s += every_s
