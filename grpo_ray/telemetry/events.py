"""Events that a run reports to its watchers: small facts, in order. Made by the loops, displayed by `launch/run/live.py`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain

from grpo_ray.telemetry.measures import Estimate


@dataclass(frozen=True)
class PhaseEvent:
    """A phase is in progress."""

    phase: str
    """The phase: `rollout`, `update`, `sync`, `eval`, `checkpoint` inside the loop; any other name is part of starting up."""
    detail: str = ""
    done: int = 0
    total: int = 0
    """The number of parts; 0 if they cannot be counted."""


@dataclass(frozen=True)
class StepEvent:
    """A step is done."""

    step: int
    """The step; the first is 1."""
    total_steps: int
    metrics: dict[str, float]
    """Metrics by the names in `grpo_ray.telemetry.catalogue`."""


@dataclass(frozen=True)
class MessageEvent:
    level: str
    """The level: `info`, `warning` or `error`."""
    text: str


@dataclass(frozen=True)
class EvalEvent:
    """Held-out accuracy after `step` steps."""

    step: int
    accuracy: float | None
    """The accuracy; None if it applies to no sample."""
    n: int
    """The number of samples that it is measured on."""
    standard_error: float
    name: str = ""
    """The name of the evaluation set, where there are several."""
    measures: dict[str, Estimate] = field(default_factory=dict)
    """Measures over several samples of each prompt: `pass@8`, `cons@8`."""
    not_applicable: int = 0
    """The number of samples to which the accuracy does not apply; they are not among `n`."""


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint of `step` is on disk under `path`."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class EndEvent:
    """The run has ended; its last event."""

    status: str
    """The status: `finished`, `failed`, or the reason of the stop."""
    text: str


Event = PhaseEvent | StepEvent | MessageEvent | EvalEvent | CheckpointEvent | EndEvent


class EventLog:
    """Log of a run's events, for watchers that are present or join late. It keeps the last events, so that it does not grow with
    the run."""

    RECENT = 1000
    """The number of newest events, all of which are kept."""
    EARLIER = 1000
    """The number of earlier events that are kept, without phases, which are over."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, Event]] = deque()
        self._earlier: deque[tuple[int, Event]] = deque(maxlen=self.EARLIER)
        self.count = 0
        """The number of events so far; they are numbered from 0."""

    def add(self, event: Event) -> None:
        self._recent.append((self.count, event))
        self.count += 1
        if len(self._recent) > self.RECENT:
            number, old = self._recent.popleft()
            if not isinstance(old, PhaseEvent):
                self._earlier.append((number, old))

    def since(self, number: int) -> list[Event]:
        """The kept events from `number` on."""
        recent_only = self._recent and self._recent[0][0] <= number
        kept = self._recent if recent_only else chain(self._earlier, self._recent)
        return [event for n, event in kept if n >= number]
