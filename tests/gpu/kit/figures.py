"""What the checks share: the shape of the model, times, and the file of figures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
SHAPE = TinyModelConfig(
    hidden_size=1536,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    intermediate_size=8960,
    vocab_size=151936,
    context=2048,
)
"""The shape of Qwen2.5-1.5B."""
SMALL = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, context=512)
"""The shape without a GPU: there the checks themselves are tried."""


def model_folder() -> Path:
    """A model of random weights, made by the first check that needs it."""
    folder = Path(os.environ["KIT_MODELS"]) / ("large" if ON_GPU else "small")
    return folder if (folder / "config.json").is_file() else build_tiny_model(folder, SHAPE if ON_GPU else SMALL)


def note(check: str, **figures: Any) -> None:
    """Add a line to the file of figures."""
    line = json.dumps({"check": check, **figures})
    print(line, flush=True)
    with (Path(os.environ["OUT"]) / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def noting(check: str, **figures: Any) -> Iterator[dict[str, Any]]:
    """Inside, figures are collected; they are noted at the end, and so is an error, which ends only this part of the check."""
    found: dict[str, Any] = {}
    try:
        yield found
    except Exception as e:
        found["error"] = f"{type(e).__name__}: {e}"[:500]
    note(check, **figures, **found)


def seconds_of(work: Callable[[], Any], times: int = 3) -> float:
    """The shortest of some runs, after one that counts for nothing."""
    work()
    measured = []
    for _ in range(times):
        _finish()
        started = time.monotonic()
        work()
        _finish()
        measured.append(time.monotonic() - started)
    return min(measured)


def gpu_gib() -> float:
    """The GPU memory in use by all processes."""
    if not ON_GPU:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _finish() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
