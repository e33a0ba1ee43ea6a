"""Metrics as Ray exports them to Prometheus: `reward/accuracy/mean` -> `ray_grpo_reward_mean{run="smoke", of="accuracy"}`.

The part that the `*` of a family matches becomes the label `of`, so that a dashboard need not know the names of reward functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from grpo_ray.telemetry.catalogue import METRICS, describe, pattern_of, star

PREFIX = "grpo_"
RAY_PREFIX = "ray_"
LABELS = ("run", "of")


@dataclass(frozen=True)
class Exported:
    name: str
    """The name without Ray's prefix."""
    of: str
    """The value of the label; '' where the metric belongs to no family."""
    help: str


@dataclass(frozen=True)
class Count:
    """A counter: the sum of a metric over the steps."""

    name: str
    metric: str
    """A metric, or a pattern whose `*` becomes the label `of`."""
    help: str


@dataclass(frozen=True)
class Distribution:
    name: str
    metric: str
    help: str
    boundaries: tuple[float, ...]


COUNTS = (
    Count(f"{PREFIX}trained_tokens_total", "tokens/trained", "Completion tokens that took part in the loss"),
    Count(f"{PREFIX}trained_groups_total", "groups/count", "Groups that were trained on"),
    Count(f"{PREFIX}dropped_groups_total", "groups/dropped/*", "Groups that were dropped, by the reason"),
    Count(f"{PREFIX}failed_scores_total", "reward/*/failed", "Scores that failed, by the reward function"),
)
STEPS = Count(f"{PREFIX}steps_total", "time/step", "Steps that were done")
"""The counter of the steps themselves."""
SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
DISTRIBUTIONS = (
    Distribution(f"{PREFIX}step_seconds", "time/step", "Seconds of a step", SECONDS),
    Distribution(
        f"{PREFIX}sync_pause_seconds", "sync/pause_s", "Seconds that generation stood still for a sync", SECONDS
    ),
)


def exported(metric: str) -> Exported:
    """The gauge that exports a metric."""
    pattern = pattern_of(metric) or metric
    of = star(metric, pattern)
    help_text, unit = METRICS.get(pattern, (describe(metric)[0], ""))
    return Exported(_gauge(pattern), of, f"{help_text} [{unit}]" if unit else help_text)


def series() -> set[str]:
    """Every name that Prometheus sees, including Ray's prefix and the parts of histograms: what a dashboard may query."""
    parts = {f"{d.name}{part}" for d in DISTRIBUTIONS for part in ("_bucket", "_sum", "_count")}
    names = {_gauge(pattern) for pattern in METRICS} | {c.name for c in (*COUNTS, STEPS)} | parts
    return {RAY_PREFIX + name for name in names}


def _gauge(pattern: str) -> str:
    return PREFIX + re.sub(r"[^a-zA-Z0-9]+", "_", pattern.replace("@", "_at_")).strip("_")
