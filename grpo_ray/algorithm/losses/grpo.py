"""GRPO, DeepSeekMath 2402.03300, eq. 3: the clipped token ratio, a mean over tokens and then over sequences."""

from __future__ import annotations

from grpo_ray.algorithm.losses.aggregation import sequence_mean
from grpo_ray.algorithm.losses.policy import PolicyLoss
from grpo_ray.algorithm.losses.ppo_clip import clipped_token_ratio

LOSS = PolicyLoss(clipped_token_ratio, sequence_mean, by_token=True)
