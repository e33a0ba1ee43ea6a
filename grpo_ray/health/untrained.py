"""Reasons why nothing of the task was learned from a group that was trained. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo_ray.config.schema import RunConfig
from grpo_ray.spread import has_spread
from grpo_ray.types import Group, TrainBatch, TrainSample

NOT_APPLICABLE, NO_SIGNAL, TRUNCATED, EMPTY, NO_GRADIENT = (
    "not_applicable",
    "no_signal",
    "truncated",
    "empty",
    "no_gradient",
)
"""The reasons why nothing was learned from a group, as the ledger records them."""


def why_untrained(
    groups: Sequence[Group], batch: TrainBatch, config: RunConfig, metrics: Mapping[str, float]
) -> dict[str, str]:
    """Map prompt ids to the reason why nothing of the task was learned from their group; groups that were learned from are left
    out.

    Args:
        batch: the batch of these groups.
        metrics: the metrics of the update.
    """
    samples: dict[int, list[TrainSample]] = {}
    for sample in batch.samples:
        samples.setdefault(sample.group, []).append(sample)
    critic = config.algorithm.advantage == "gae"
    all_equal = critic and len({r for g in groups for s in g.scores for r in s.rewards if r == r}) < 2
    still = metrics.get("grad_norm") == 0 and not metrics.get("critic/grad_norm")
    out = {}
    for number, group in enumerate(groups):
        own = samples.get(number, [])
        # A critic learns from groups without spread, as long as the step as a whole has some.
        flat = all_equal if critic else not has_spread(group)
        reason = _why(group, own, flat=flat, still=still)
        if reason is not None:
            out[group.prompt.id] = reason
    return out


def _why(group: Group, samples: Sequence[TrainSample], *, flat: bool, still: bool) -> str | None:
    if all(score.value != score.value for score in group.scores):
        return NOT_APPLICABLE
    if flat:
        return NO_SIGNAL
    if not any(s.loss_mask and s.num_sampled > 0 for s in samples):
        return EMPTY if any(s.loss_mask for s in samples) else TRUNCATED
    return NO_GRADIENT if still else None
