"""Dr. GRPO, 2503.20783: the clipped token ratio, summed and divided by a constant instead of the length."""

from __future__ import annotations

from grpo_ray.algorithm.losses.aggregation import fixed_length
from grpo_ray.algorithm.losses.policy import PolicyLoss
from grpo_ray.algorithm.losses.ppo_clip import clipped_token_ratio

LOSS = PolicyLoss(clipped_token_ratio, fixed_length, by_token=True)
