"""What every case of `make bench-versus` leaves, and what is read from it: a line a step, with the names of `metrics.jsonl`.

A step's seconds are from the end of the one before to its own end by the clock, evaluations and checkpoints between them apart.
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from grpo_ray.telemetry.tracking import read_metrics


class StepLog:
    """Writes the lines of a case that is not a run of grpo-ray."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def step(self, step: int, tokens: int, *, ended: float | None = None, **metrics: float) -> None:
        """`tokens` of the completions; `ended` if that was not now."""
        line = {"step": step, "time": time.time() if ended is None else ended, "tokens": tokens, **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Waits, so that whoever counts this process' CPU seconds after its last step still can."""
        self._file.close()
        time.sleep(1.0)


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of steps, in order, without that of the evaluation before the first."""
    return [line for line in read_metrics(path) if line["step"] > 0]


def step_seconds(lines: list[dict[str, Any]]) -> list[float]:
    """Of every line but the first."""
    return [
        after["time"] - before["time"] - before.get("time/eval", 0.0) - before.get("time/checkpoint", 0.0)
        for before, after in pairwise(lines)
    ]


def tokens_of(line: dict[str, Any], samples: int) -> float:
    """Completion tokens of a step."""
    return line["tokens"] if "tokens" in line else line["completions/mean_length"] * samples
