"""The clipped objective of PPO (1707.06347, eq. 7) with DAPO's two bounds (2503.14476, eq. 10), for any ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, TokenLosses

if TYPE_CHECKING:
    from jaxtyping import Float


def clipped(ratio_N: Float[Tensor, "N"], advantages_N: Float[Tensor, "N"], o: LossOptions) -> TokenLosses:
    """-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A).

    With `dual_clip_c`, where A < 0 the loss is at most -c A (dual-clip PPO, 1912.09729, eq. 5): the loss of a bad sample that has
    become much more likely is bounded. TRL's `delta` clamps r to it in the first branch; with delta > 1 + epsilon_high that is the
    same function.
    """
    bounded_N = ratio_N.clamp(1 - o.epsilon_low, 1 + o.epsilon_high)
    loss_N = -torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    if o.dual_clip_c is not None:
        loss_N = torch.where(advantages_N < 0, torch.minimum(loss_N, -o.dual_clip_c * advantages_N), loss_N)
    ratio_N = ratio_N.detach()
    return TokenLosses(
        loss_N=loss_N,
        ratio_N=ratio_N,
        clip_low_N=(ratio_N < 1 - o.epsilon_low) & (advantages_N < 0),
        clip_high_N=(ratio_N > 1 + o.epsilon_high) & (advantages_N > 0),
    )


def clipped_token_ratio(x: PolicyInputs, o: LossOptions) -> TokenLosses:
    """`clipped`, with r_t = exp(logps_t - old_logps_t)."""
    return clipped(bounded_exp(x.logps_N - x.old_logps_N), x.advantages_N, o)
