"""CISPO, MiniMax-M1 2506.13585, eq. 4: REINFORCE weighted by a capped ratio, so that no token loses its gradient.

-sg(min(r_t, cap)) A log p_t, a mean over all tokens. The cap is a ratio: TRL calls it `epsilon_high` (5.0 after
ScaleRL, 2510.13786), in verl it is 1 + `clip_ratio_high`. The paper's lower bound is not used there either.
"""

from __future__ import annotations

import torch

from grpo_ray.algorithm.losses.aggregation import token_mean
from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, PolicyLoss, TokenLosses


def token_loss(x: PolicyInputs, o: LossOptions) -> TokenLosses:
    ratio_N = bounded_exp((x.logps_N - x.old_logps_N).detach())
    loss_N = -ratio_N.clamp(max=o.cispo_max_ratio) * x.advantages_N * x.logps_N
    capped_N = (ratio_N > o.cispo_max_ratio) & (x.advantages_N > 0)
    return TokenLosses(loss_N, ratio_N, clip_low_N=torch.zeros_like(capped_N), clip_high_N=capped_N)


LOSS = PolicyLoss(token_loss, token_mean, by_token=True)
