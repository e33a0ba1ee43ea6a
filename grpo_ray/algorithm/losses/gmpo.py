"""GMPO, 2507.20673: the geometric mean of the token ratios, each clipped before.

l_t = log r_t, bounded in the direction of the advantage alone as in PPO: min(l_t, epsilon_high) where A > 0, and
max(l_t, -epsilon_low) else; the bounds are of the *logarithm* (the paper's 0.4: ratios in [e^-0.4, e^0.4]).
-exp(mean_t l_t) A, a mean over sequences.
"""

from __future__ import annotations

import torch

from grpo_ray.algorithm.losses.aggregation import sequence_mean
from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, PolicyLoss, TokenLosses


def token_loss(x: PolicyInputs, o: LossOptions) -> TokenLosses:
    log_ratio_N = x.logps_N - x.old_logps_N
    positive_N = x.advantages_N > 0
    bounded_N = torch.where(positive_N, log_ratio_N.clamp(max=o.epsilon_high), log_ratio_N.clamp(min=-o.epsilon_low))
    ratio_N = x.segments.spread(bounded_exp(x.segments.mean(bounded_N)))
    return TokenLosses(
        loss_N=-ratio_N * x.advantages_N,
        ratio_N=ratio_N.detach(),
        clip_low_N=(log_ratio_N < -o.epsilon_low) & (x.advantages_N < 0),
        clip_high_N=(log_ratio_N > o.epsilon_high) & positive_N,
    )


LOSS = PolicyLoss(token_loss, sequence_mean)
