"""Scores of samples in this process, without the deadlines and the protection of a pool."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward, weighted_sum
from grpo_ray.types import Score


def score_samples(functions: Sequence[RewardFunction], inputs: ScoreInputs) -> list[Score]:
    """The scores of all functions together."""
    by_function = [call_reward(function, inputs) for function in functions]
    weights = [f.weight for f in functions]
    return [weighted_sum([parts[s] for parts in by_function], weights, n) for s, n in enumerate(inputs.lengths)]
