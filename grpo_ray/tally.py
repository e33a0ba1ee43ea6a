"""What the scores of a step say, counted while its groups come: nothing but numbers, and one row to quote."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from grpo_ray.train_batch import has_spread
from grpo_ray.types import Group, RewardScore, SampleInfo, ScoreStatus


@dataclass
class Extent:
    """How far values reach, and how many there are."""

    count: int = 0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, values: Iterable[float]) -> None:
        for value in values:
            self.count += 1
            self.lowest = min(self.lowest, value)
            self.highest = max(self.highest, value)

    def join(self, other: Extent) -> None:
        self.count += other.count
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)

    @property
    def flat(self) -> bool:
        """There are values, and all are the same."""
        return self.lowest == self.highest


@dataclass
class FunctionTally:
    """One reward function."""

    values: Extent = field(default_factory=Extent)
    not_applicable: int = 0
    columns: Mapping[str, Any] | None = None
    """Of the first row that it had nothing to say of."""

    def add(self, part: RewardScore, columns: Mapping[str, Any]) -> None:
        if part.status is ScoreStatus.OK:
            self.values.add([part.value])
        elif part.status is ScoreStatus.NOT_APPLICABLE:
            self.not_applicable += 1
            self.columns = columns if self.columns is None else self.columns


@dataclass
class Moments:
    """Means of groups: how many, their sum and the sum of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

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
    """Of the groups of one step. `accuracy` names the function that says what is right, from `threshold` on."""

    accuracy: str
    threshold: float
    groups: int = 0
    with_spread: int = 0
    samples: int = 0
    failed: int = 0
    """Scores that failed, whatever they count as."""
    cut: int = 0
    """At the longest completion."""
    empty: int = 0
    rewards: Extent = field(default_factory=Extent)
    of_groups: Moments = field(default_factory=Moments)
    """Mean reward of each group that has one."""
    of_samples: Moments = field(default_factory=Moments)
    right: Moments = field(default_factory=Moments)
    """Part of the right samples, of each group to which the accuracy applies."""
    functions: dict[str, FunctionTally] = field(default_factory=dict)

    def add(self, group: Group) -> None:
        self.groups += 1
        self.with_spread += has_spread(group)
        self.samples += len(group.samples)
        self.failed += sum(score.status.failed for score in group.scores)
        self.cut += sum(info.finish_reason == "length" for info in group.samples)
        self.empty += sum(is_empty(info) for info in group.samples)
        values = [s.value for s in group.scores if s.value == s.value]
        # What a failed score counts as is no word of the reward.
        self.rewards.add(r for s in group.scores for r in s.rewards if r == r)
        if values:
            self.of_groups.add(math.fsum(values) / len(values))
        for value in values:
            self.of_samples.add(value)
        right = []
        for score in group.scores:
            for part in score.parts:
                self.functions.setdefault(part.name, FunctionTally()).add(part, group.prompt.columns)
                if part.name == self.accuracy and part.status is ScoreStatus.OK:
                    right.append(part.value >= self.threshold)
        if right:
            self.right.add(sum(right) / len(right))


def is_empty(info: SampleInfo) -> bool:
    """It ended at once: with no token, or with one that ends it."""
    return info.num_tokens == 0 or (info.num_tokens == 1 and info.finish_reason != "length")
