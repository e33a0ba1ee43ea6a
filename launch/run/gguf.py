"""A GGUF file as a folder of Hugging Face's: weights of 16 bits instead of quantised blocks, with config and tokenizer.

It runs in a process of its own: torch and Transformers take a gigabyte, which a command that trains afterwards would keep.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from grpo_ray.errors import ConfigError, told
from grpo_ray.files import readable_as_asked
from grpo_ray.plain_terminal import say

_CHILD = "import sys; sys.path[:] = {path!r}; from launch.run.gguf import main; main()"
CONVERSION_S = 900.0
"""The time limit of a conversion, which takes seconds on a quiet machine."""


def convert(source: Path, folder: Path, end_of_turn: str) -> None:
    """Write the folder in a child process.

    Args:
        source: the GGUF file.
        folder: the new folder.
        end_of_turn: the token that has to end a sample of this model.

    Raises:
        ConfigError: the file can't be read as a chat model with this end of a turn.
    """
    command = [sys.executable, "-P", "-c", _CHILD.format(path=sys.path), str(source), str(folder), end_of_turn]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERSION_S, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{source.name} was not converted in {CONVERSION_S:g} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}: is there memory for it?"]
        raise ConfigError(f"{source.name} can't be converted: {lines[-1]}")


def main() -> None:
    """Run the child: its arguments are those of `write_folder`."""
    source, folder, end_of_turn = sys.argv[1:]
    try:
        write_folder(Path(source), Path(folder), end_of_turn)
    # What the readers raise of a file that is broken is of many kinds.
    except Exception as e:
        say(told(e), error=True)
        sys.exit(1)


def write_folder(source: Path, folder: Path, end_of_turn: str) -> None:
    """Write the folder. Raises ConfigError as `convert`, and whatever Transformers raises of a broken file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    if tokenizer.eos_token != end_of_turn or not tokenizer.chat_template:
        raise ConfigError(
            f"it ends a turn by {tokenizer.eos_token!r} and has {'a' if tokenizer.chat_template else 'no'} chat template; expected "
            f"{end_of_turn!r} and a chat template"
        )
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.bfloat16, **where)
    # The weights are not quantised any more, and Transformers would refuse to save them.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readable_as_asked(folder)
