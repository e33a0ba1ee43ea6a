"""Do rewards differ, or only their rounding? Whoever asks (advantages, dynamic sampling, metrics) asks here."""

from __future__ import annotations

from collections.abc import Iterable

from grpo_ray.types import Group

RELATIVE = 1e-6
"""A few roundings of fp32: 0.1 + 0.2 and 0.3 are the same reward, and so are two sums of the same parts in another order."""
ABSOLUTE = 1e-12
"""Parts that cancel: 0.1 + 0.2 - 0.3 is 5.6e-17, and the same reward as 0."""


def tolerance(largest: float) -> float:
    """How far values of at most this size may be apart and count as equal."""
    return max(RELATIVE * largest, ABSOLUTE)


def differ(values: Iterable[float]) -> bool:
    """Are two of them further apart than rounding? NaN is no value."""
    known = [v for v in values if v == v]
    return bool(known) and max(known) - min(known) > tolerance(max(map(abs, known)))


def has_spread(group: Group) -> bool:
    """Do two of its rewards differ (of its steps, where it has some)? DAPO 2503.14476, eq. 11 says so of right and wrong
    answers: 0 < right < G.

    Always of the scores, before a KL is taken off them: two wrong answers that are unequally far from the reference say
    nothing of the task, and a batch of such groups would train on the KL alone.
    """
    return differ(reward for s in group.scores for reward in s.rewards)
