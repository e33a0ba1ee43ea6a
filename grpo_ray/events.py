"""What a run tells those who watch it: small facts, in order. Made by the loops, drawn by `launch/live.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from grpo_ray.measures import Estimate


@dataclass(frozen=True)
class PhaseEvent:
    """Something is under way."""

    phase: str
    """`rollout`, `update`, `sync`, `eval`, `checkpoint` inside the loop; any other name is part of starting up."""
    detail: str = ""
    done: int = 0
    total: int = 0
    """0: it can't be counted."""


@dataclass(frozen=True)
class StepEvent:
    """A step is done."""

    step: int
    """1 is the first."""
    total_steps: int
    metrics: dict[str, float]
    """Names as in `grpo_ray.metrics`."""


@dataclass(frozen=True)
class MessageEvent:
    level: str
    """`info`, `warning` or `error`."""
    text: str


@dataclass(frozen=True)
class EvalEvent:
    """Held-out accuracy after `step` steps."""

    step: int
    accuracy: float
    n: int
    """Samples behind it."""
    standard_error: float
    name: str = ""
    """Of the evaluation set, where there are several."""
    measures: dict[str, Estimate] = field(default_factory=dict)
    """What several samples of each prompt say besides: `pass@8`, `cons@8`."""


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint of `step` is on disk under `path`."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class EndEvent:
    """The last one of a run."""

    status: str
    """`finished`, `failed`, or the reason of the stop."""
    text: str


Event = PhaseEvent | StepEvent | MessageEvent | EvalEvent | CheckpointEvent | EndEvent
