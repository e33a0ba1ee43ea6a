"""The clipped policy objective of PPO (1707.06347, eq. 7), per token, with DAPO's two bounds (2503.14476, eq. 10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PolicyLossStats:
    """Sums over the tokens of one micro-batch, 0-dim and detached, to be summed (the maximum: maximised) over the
    others.
    """

    loss: Tensor
    ratio: Tensor
    clip_low: Tensor
    """Tokens that the lower bound cut off (advantage < 0, ratio < 1 - clip_low)."""
    clip_high: Tensor
    """Tokens that the upper bound cut off (advantage > 0, ratio > 1 + clip_high)."""
    approx_kl: Tensor
    """k3 of (old || theta): how far this step's earlier updates have moved the policy."""
    mismatch_abs: Tensor
    """|rollout - old|: the engine's log-probability against the learner's for the same weights."""
    mismatch_max: Tensor


def policy_loss(
    theta_N: Tensor,
    old_N: Tensor,
    rollout_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, PolicyLossStats]:
    """sum_t w_t * -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t), r_t = exp(theta_t - old_t).

    Args:
        theta_N: [N] log-probabilities under the weights being trained; the only one with a gradient.
        old_N: [N] those of the learner for the version that sampled.
        rollout_N: [N] those that the sampler reported; for the statistics.
        advantages_N: [N].
        weights_N: [N], with the global normalizer inside (`aggregation.py`).
        clip_low: how far the ratio may fall below 1.
        clip_high: how far it may rise above 1.

    Returns:
        The loss (0-dim, fp32), and sums for the metrics.
    """
    log_ratio = theta_N - old_N
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weights_N * torch.minimum(ratio * advantages_N, clipped * advantages_N)).sum()
    with torch.no_grad():
        mismatch = (rollout_N - old_N).abs()
        stats = PolicyLossStats(
            loss=loss.detach(),
            ratio=ratio.sum(),
            clip_low=((ratio < 1 - clip_low) & (advantages_N < 0)).sum().to(loss.dtype),
            clip_high=((ratio > 1 + clip_high) & (advantages_N > 0)).sum().to(loss.dtype),
            approx_kl=(ratio - 1 - log_ratio).sum(),
            mismatch_abs=mismatch.sum(),
            mismatch_max=mismatch.max(),
        )
    return loss, stats
