"""The file `ended.json` of a run: how it ended and at which step, so that a finished run is recognised without starting
anything."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import StoreAwayError
from grpo_ray.files import read_json, write_whole
from grpo_ray.run.run_dir import RunDir

FILE = "ended.json"


@dataclass(frozen=True)
class Ended:
    status: str
    """The status, as in `events.EndEvent`."""
    text: str
    step: int
    """The number of steps done."""
    total_steps: int
    length: list[Any]
    """The options that determine the run's length, see `length_of`."""


def length_of(config: RunConfig | SftConfig) -> list[Any]:
    return [config.num_steps, config.num_epochs if config.num_steps is None else None, config.data.last_batch]


def write_ended(run: Path, config: RunConfig | SftConfig, status: str, text: str, step: int, total_steps: int) -> None:
    ended = Ended(status, text, step, total_steps, length_of(config))
    write_whole(run / FILE, json.dumps(asdict(ended)).encode())


def read_ended(run: Path) -> Ended | None:
    """Read the file; None if the run has not ended by itself, or the file cannot be read."""
    try:
        ended = Ended(**read_json(run / FILE))
        numbers = type(ended.step) is int and type(ended.total_steps) is int
        if not numbers or not isinstance(ended.length, list) or len(ended.length) != 3:
            return None
        return replace(ended, status=str(ended.status), text=str(ended.text))
    except (OSError, ValueError, TypeError):
        return None


def finished(run: RunDir, config: RunConfig | SftConfig) -> Ended | None:
    """How the run ended, if all of its steps are done and its newest checkpoint is of the last: then nothing is left to do. None if
    it has steps to do, or a checkpoint to send to its store, or that cannot be known without its data.
    """
    if run.store.is_remote and run.outbox.steps():
        return None
    ended = read_ended(run.path)
    if ended is not None and (ended.length != length_of(config) or ended.step < ended.total_steps):
        ended = None
    try:
        newest = run.newest_step()
    except StoreAwayError:
        return ended
    if newest is None:
        return None
    if ended is not None and ended.step == newest:
        return ended
    if config.num_steps is not None and newest >= config.num_steps:
        return Ended("finished", "", newest, config.num_steps, length_of(config))
    return None
