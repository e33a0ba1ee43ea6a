"""Scores of samples, and what reward functions are told of the training; all other code imports them from `types.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar, dataclass_transform

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


@dataclass(frozen=True)
class TrainerState:
    """Progress of training, for reward functions: what exists here of TRL's `trainer_state` (transformers' TrainerState)."""

    global_step: int
    """The last step done when the prompt was dispatched; in an evaluation, the last step done."""
    max_steps: int
    """The number of steps of the whole run."""
    epoch: float
    """The number of passes through the data set at that step, as a fraction."""
    num_train_epochs: int
    """The number of passes that the run begins."""

    @classmethod
    def at(
        cls, step: int, max_steps: int, *, prompts_per_step: int, num_prompts: int, num_trained: int | None = None
    ) -> TrainerState:
        """Compute the state. `num_trained`: prompts of the run, where its last step may have fewer; None: all have as many."""
        whole = max_steps * prompts_per_step if num_trained is None else num_trained
        return cls(step, max_steps, min(step * prompts_per_step, whole) / num_prompts, math.ceil(whole / num_prompts))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"trainer_state has no {name!r} here; it has {', '.join(f.name for f in fields(TrainerState))}"
        )
