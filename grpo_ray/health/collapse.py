"""Collapse detection: each step is compared with the best of those shortly before it. Pure.

Thresholds are high: a mean over a few prompts is noisy, and data may get harder. What is reported here has no such excuse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from grpo_ray.health.tally import Moments

BEST_OF = 5
"""The number of steps whose mean is a level that a run has reached."""
NOW = (1, 2, 4, 8)
"""The numbers of last steps whose mean is compared with it: a few prompts a step are significant only together."""
OF_LEVEL = 1 / 3
"""The fraction of its level at which an accuracy counts as fallen; it has recovered only above twice this fraction."""
LEAST_FALL = 0.1
LEAST_Z, LEAST_Z_OF_REWARD = 4.5, 6.0
"""The least z-score, in standard errors of the difference; groups are independent. Many differences are compared over a run."""
LEAST_GROUPS = 8
"""The least number of groups from which a spread can be estimated."""
LEAST_STDS = 1.5
"""A reward without a natural zero has fallen by this many standard deviations of a sample, and by half of what it was."""
ENTROPY_TIMES, ENTROPY_NATS = 3.0, 1.0
NO_ENTROPY = 0.01
"""The entropy in nats a token below which every sample of a prompt is the same."""
GRADIENT_TIMES = 100.0


@dataclass(frozen=True)
class Fall:
    level: float
    now: float


def accuracy_fell(series: Sequence[Moments], *, told: bool) -> Fall | None:
    """Detect a fall of the accuracy.

    Args:
        series: the fraction of right samples by group, for each step.
        told: whether it had fallen at the step before.
    """
    for level, now, z in _falls(series, 0.3):
        left = 2 * OF_LEVEL if told else OF_LEVEL
        fell = now <= left * level and level - now >= LEAST_FALL
        if fell and (told or z >= LEAST_Z):
            return Fall(level, now)
    return None


def reward_fell(series: Sequence[Moments], samples: Sequence[Moments], *, told: bool) -> Fall | None:
    """Detect a fall like `accuracy_fell`, of mean rewards of groups and of single rewards."""
    unit = max((m.std for m in samples[:-1]), default=0.0)
    for level, now, z in _falls(series, 0.1):
        part = 0.5 if told else 1.0
        fell = level - now >= part * max(LEAST_STDS * unit, 0.5 * abs(level), 1e-6)
        if fell and (told or z >= LEAST_Z_OF_REWARD):
            return Fall(level, now)
    return None


def _falls(series: Sequence[Moments], least_spread: float) -> list[tuple[float, float, float]]:
    """Triples (level, now, z) for each of NOW.

    Args:
        least_spread: the least spread of groups around their mean, as a fraction of it: if all were alike before, they need not
            stay so.
    """
    known = [m for m in series if m.count]
    out = []
    for recent in NOW:
        before, last = known[:-recent], Moments.pooled(known[-recent:])
        if not before:
            break
        first = min(BEST_OF, len(before))
        best = max((Moments.pooled(before[i - first : i]) for i in range(first, len(before) + 1)), key=lambda m: m.mean)
        if best.count < LEAST_GROUPS:
            continue
        spread = max(best.std, least_spread * abs(best.mean), 1e-9)
        error = spread * math.sqrt(1 / best.count + 1 / last.count)
        out.append((best.mean, last.mean, (best.mean - last.mean) / error))
    return out


def entropy_rose(before: Sequence[float], now: float, *, told: bool) -> Fall | None:
    """Detect a rise of the entropy of a policy that was certain of its choices."""
    if not before:
        return None
    level = median(before)
    part = 0.5 if told else 1.0
    rose = now >= part * ENTROPY_TIMES * level and now - level >= part * ENTROPY_NATS
    return Fall(level, now) if rose else None


def entropy_vanished(before: Sequence[float], now: float, right: float | None) -> bool:
    """Whether all samples of a prompt are the same and most of them wrong: nothing new will be tried any more."""
    return bool(before) and now < NO_ENTROPY <= median(before) / 10 and right is not None and right < 0.5


def gradient_exploded(before: Sequence[float], now: float, limit: float) -> bool:
    """Whether the gradient norm has exploded.

    Args:
        limit: the norm to which gradients are clipped, or 1.
    """
    moved = [norm for norm in before if norm > 0]
    return len(moved) >= BEST_OF and now > GRADIENT_TIMES * median(moved) and now > 10 * limit
