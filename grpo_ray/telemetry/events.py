"""What a run tells those who watch it: small facts, in order. Made by the loops, drawn by `launch/run/live.py`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain

from grpo_ray.telemetry.measures import Estimate


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
    """Names as in `grpo_ray.telemetry.catalogue`."""


@dataclass(frozen=True)
class MessageEvent:
    level: str
    """`info`, `warning` or `error`."""
    text: str


@dataclass(frozen=True)
class EvalEvent:
    """Held-out accuracy after `step` steps."""

    step: int
    accuracy: float | None
    """None: it applies to no sample."""
    n: int
    """Samples behind it."""
    standard_error: float
    name: str = ""
    """Of the evaluation set, where there are several."""
    measures: dict[str, Estimate] = field(default_factory=dict)
    """What several samples of each prompt say besides: `pass@8`, `cons@8`."""
    not_applicable: int = 0
    """Samples to which the accuracy does not apply; they are not among `n`."""


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


class EventLog:
    """What a run has told, for those who watch and those who come late; of a long run the end, so that it does not grow with it."""

    RECENT = 1000
    """The newest events, all of them."""
    EARLIER = 1000
    """Those before, without phases, which are over."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, Event]] = deque()
        self._earlier: deque[tuple[int, Event]] = deque(maxlen=self.EARLIER)
        self.count = 0
        """Events so far; they are numbered from 0."""

    def add(self, event: Event) -> None:
        self._recent.append((self.count, event))
        self.count += 1
        if len(self._recent) > self.RECENT:
            number, old = self._recent.popleft()
            if not isinstance(old, PhaseEvent):
                self._earlier.append((number, old))

    def since(self, number: int) -> list[Event]:
        """Those that are kept from event `number` on."""
        recent_only = self._recent and self._recent[0][0] <= number
        kept = self._recent if recent_only else chain(self._earlier, self._recent)
        return [event for n, event in kept if n >= number]
