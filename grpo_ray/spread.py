"""Spread of rewards: whether they differ by more than rounding, in one place for advantages, dynamic sampling and metrics."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_ray.types import Group

RELATIVE = 1e-6
"""The relative tolerance, a few roundings of fp32: 0.1 + 0.2 and 0.3 are the same reward, and so are two sums of the same parts in
another order.
"""
ABSOLUTE = 1e-12
"""The absolute tolerance, for parts that cancel: 0.1 + 0.2 - 0.3 is 5.6e-17, and the same reward as 0."""


def tolerance(largest: float) -> float:
    """The largest difference at which values of at most this size count as equal."""
    return max(RELATIVE * largest, ABSOLUTE)


def differ(values: Iterable[float]) -> bool:
    """Whether two of the values differ by more than rounding. NaN is no value."""
    known = [v for v in values if v == v]
    return bool(known) and max(known) - min(known) > tolerance(max(map(abs, known)))


def has_spread(group: Group) -> bool:
    """Whether two rewards of the group differ (of its steps, if it has any). DAPO 2503.14476, eq. 11 requires it of right and wrong
    answers: 0 < right < G.

    The scores are compared before a KL is subtracted: two wrong answers at different distances from the reference carry no signal
    of the task, and a batch of such groups would train on the KL alone.
    """
    return differ(reward for s in group.scores for reward in s.rewards)
