"""DAPO, 2503.14476, eq. 8: the clipped token ratio, a mean over all tokens. TRL's `bnpo` differs from it only in that
its mean is of each micro-batch by itself.
"""

from __future__ import annotations

from grpo_ray.algorithm.losses.aggregation import token_mean
from grpo_ray.algorithm.losses.policy import PolicyLoss
from grpo_ray.algorithm.losses.ppo_clip import clipped_token_ratio

LOSS = PolicyLoss(clipped_token_ratio, token_mean, by_token=True)
