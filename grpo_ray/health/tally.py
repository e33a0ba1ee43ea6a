"""Tally of a step's scores, counted while its groups arrive: numbers alone, and one row to quote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from grpo_ray.spread import has_spread
from grpo_ray.types import TRUNCATED, Group, RewardScore, SampleInfo, ScoreStatus


@dataclass
class Extent:
    """The range of values, and their number."""

    count: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, values: Sequence[float]) -> None:
        if values:
            self.join(Extent(len(values), min(values), max(values)))

    def join(self, other: Extent) -> None:
        self.count += other.count
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)

    @property
    def flat(self) -> bool:
        """Whether there are values, and all are the same."""
        return self.lowest == self.highest


@dataclass
class FunctionTally:
    """The tally of one reward function."""

    values: Extent = field(default_factory=Extent)
    not_applicable: int = 0
    columns: Mapping[str, Any] | None = None
    """The columns of the first row to which the function did not apply."""

    def add(self, parts: Sequence[RewardScore], columns: Mapping[str, Any]) -> None:
        """Add its scores of the samples of a group."""
        self.values.add([p.value for p in parts if p.status is ScoreStatus.OK])
        silent = sum([p.status is ScoreStatus.NOT_APPLICABLE for p in parts])
        self.not_applicable += silent
        if silent and self.columns is None:
            self.columns = columns


@dataclass
class Moments:
    """Moments of group means: their number, their sum and the sum of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, *values: float) -> None:
        self.count += len(values)
        self.total += sum(values)
        self.squares += sum([v * v for v in values])

    @classmethod
    def pooled(cls, parts: Iterable[Moments]) -> Self:
        out = cls()
        for part in parts:
            out.count += part.count
            out.total += part.total
            out.squares += part.squares
        return out

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0)) if self.count else 0.0


@dataclass
class Tally:
    """The tally of the groups of one step. `accuracy` names the function that decides what is right, from `threshold` on."""

    accuracy: str
    threshold: float
    groups: int = 0
    with_spread: int = 0
    samples: int = 0
    failed: int = 0
    """The number of failed scores, whatever value they count as."""
    cut: int = 0
    """The number of completions truncated at max_completion_length."""
    empty: int = 0
    rewards: Extent = field(default_factory=Extent)
    of_groups: Moments = field(default_factory=Moments)
    """The mean rewards of the groups that have one."""
    of_samples: Moments = field(default_factory=Moments)
    right: Moments = field(default_factory=Moments)
    """The fractions of right samples, of the groups to which the accuracy applies."""
    functions: dict[str, FunctionTally] = field(default_factory=dict)

    def add(self, group: Group) -> None:
        self.groups += 1
        self.with_spread += has_spread(group)
        self.samples += len(group.samples)
        self.failed += sum([score.status.failed for score in group.scores])
        self.cut += sum([info.finish_reason in TRUNCATED for info in group.samples])
        self.empty += sum([is_empty(info) for info in group.samples])
        self.rewards.add([r for s in group.scores for r in s.rewards if r == r])
        values = [s.value for s in group.scores if s.value == s.value]
        self.of_samples.add(*values)
        if values:
            self.of_groups.add(sum(values) / len(values))
        of: dict[str, list[RewardScore]] = {}
        for score in group.scores:
            for part in score.parts:
                of.setdefault(part.name, []).append(part)
        for name, parts in of.items():
            self.functions.setdefault(name, FunctionTally()).add(parts, group.prompt.columns)
        judged = [p.value >= self.threshold for p in of.get(self.accuracy, ()) if p.status is ScoreStatus.OK]
        if judged:
            self.right.add(sum(judged) / len(judged))


def is_empty(info: SampleInfo) -> bool:
    """Whether the completion ended at once: without a sampled token, or with an end token alone."""
    return info.num_sampled == 0 or (info.num_sampled == 1 and info.finish_reason not in TRUNCATED)
