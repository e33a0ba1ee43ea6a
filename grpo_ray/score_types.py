"""Records of what a sample is worth, by one reward function and in all; the part of `types` that scoring alone needs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """Dataclass made several times a sample: frozen to the type checker alone, since run-time freezing makes it four times as
    slow."""
    return dataclass(unsafe_hash=True, slots=True)(cls)


class ScoreStatus(StrEnum):
    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    ERROR = "error"

    def __init__(self, value: str) -> None:
        self.failed = value not in ("ok", "not_applicable")
        """Whether the machinery failed, not the model. An attribute, not a property: it is read several times for every score."""


@dataclass(frozen=True)
class Step:
    """Process supervision: one number for a part of a completion, which starts at the end of the step before it."""

    end: int
    """The index of its last token, 0 .. T-1."""
    value: float
    """The reward of the step; in a trained sample the advantage of its tokens."""


class LoggedMetric(NamedTuple):
    """A figure that a reward function logs beside its rewards (TRL's `log_metric`, numbers of verl's dict), over one call."""

    name: str
    total: float
    """The sum of the finite values."""
    num_finite: int
    num_not_finite: int


@record
class RewardScore:
    """The result of one reward function for one sample."""

    name: str
    status: ScoreStatus
    value: float
    """The reward before its weight; the sum over its steps. NaN unless status is `ok`."""
    detail: str = ""
    """What happened, in one line, when the function failed."""
    seconds: float = 0.0
    steps: tuple[Step, ...] = ()
    """Step rewards before their weight, sorted by their ends. Empty: one number for the whole completion."""
    extra: tuple[tuple[str, str | float | bool | None], ...] = ()
    """(column, value) pairs that the function logs for this sample: TRL's `log_extra`, the entries of verl's dict."""
    logged: tuple[LoggedMetric, ...] = ()
    """Figures of the call that scored the sample, at the call's first sample alone."""


@record
class Score:
    """The weighted sum of a sample's rewards. A failure is a status, never a zero.

    Example: Score(ScoreStatus.OK, 1.2, (RewardScore("accuracy", ScoreStatus.OK, 1.0), RewardScore("format", ScoreStatus.OK, 0.2)))
    """

    status: ScoreStatus
    """`ok`; `not_applicable` if no reward applied; otherwise the first failure among the parts."""
    value: float
    """sum_k weight_k * value_k over the parts that apply. NaN unless status is `ok`."""
    parts: tuple[RewardScore, ...] = ()
    detail: str = ""
    steps: tuple[Step, ...] = ()
    """Weighted step rewards of all parts, by their ends; a part without steps is one step to the last token. Empty if none has
    any."""

    @property
    def rewards(self) -> tuple[float, ...]:
        """The rewards of its steps, or the one of the whole completion."""
        return tuple(step.value for step in self.steps) if self.steps else (self.value,)
