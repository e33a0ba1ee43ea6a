"""Whole runs through the command line, for the tests beside this file."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 300
NUM_STEPS = 6
RECIPE: dict[str, Any] = {
    "model": {
        "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seed": 3},
        "dtype": "float32",
    },
    "data": {
        "train": {"path": "reasoning_gym:chain_sum", "args": {"size": 64, "seed": 1}},
        "eval": {"path": "reasoning_gym:chain_sum", "args": {"size": 8, "seed": 2}},
        "max_prompt_length": 120,
    },
    "rollout": {"num_generations": 4, "max_completion_length": 24, "num_cpus": 0.5},
    "reward": {"functions": [{"name": "tests.end_to_end.rewards.share_of_digits"}], "num_cpus": 0},
    "learner": {"zero_stage": 2, "learning_rate": 1e-3, "num_cpus": 0.5, "micro_batch_tokens": 2048},
    "prompts_per_step": 4,
    "num_steps": NUM_STEPS,
    "eval": {"threshold": 0.5},
}
started: list[subprocess.Popen[str]] = []


def write_recipe(folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {"COLUMNS": "150", "PYTHONPATH": str(ROOT)}


@contextmanager
def interruptible() -> Iterator[None]:
    """What is started inside ends by SIGINT. Under nohup, and in the background of a shell, it would be born with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def launch(*args: str, wrapper: list[str] | None = None, output: IO[str] | None = None) -> subprocess.Popen[str]:
    """`grpo-ray ARGS` in a session of its own; `wrapper` gets the interpreter and ARGS appended.

    `output`: for what is printed; None: a pipe, which `finish` reads.
    """
    command = [*wrapper, sys.executable, *args] if wrapper else [sys.executable, "-m", "launch", *args]
    with interruptible():
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE if output is None else output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output; fails the test when it does not end."""
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end within {LIMIT_S} s:\n{output}")
    return process.returncode, output


def run(*args: str, wrapper: list[str] | None = None) -> tuple[int, str]:
    return finish(launch(*args, wrapper=wrapper))


def end_all() -> None:
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    started.clear()


def train(recipe: Path, name: str, *overrides: str) -> tuple[list[str], Path]:
    """Arguments of a run beside its recipe, and its folder."""
    folder = recipe.parent
    return ["train", str(recipe), f"dir={folder}", f"name={name}", *overrides], folder / name


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """One per step."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/policy" in line]


def ledger(run_dir: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(run_dir / "ledger.sqlite") as db:
        return list(
            db.execute("SELECT prompt_id, dispatch_order, state, step, drop_reason FROM groups ORDER BY dispatch_order")
        )
