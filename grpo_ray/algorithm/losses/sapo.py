"""SAPO, 2511.20347: a soft gate instead of the clip, so that no token's gradient is cut off at once.

-(4 / tau) sigmoid(tau (r_t - 1)) A, with a tau for positive and one for other advantages; a mean over tokens and then
over sequences. At r = 1 its gradient is that of -r A.
"""

from __future__ import annotations

import torch

from grpo_ray.algorithm.losses.aggregation import sequence_mean
from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, PolicyLoss, TokenLosses


def token_loss(x: PolicyInputs, o: LossOptions) -> TokenLosses:
    ratio_N = bounded_exp(x.logps_N - x.old_logps_N)
    positive_N = x.advantages_N > 0
    pos, neg = (ratio_N.new_full((), tau) for tau in (o.sapo_temperature_pos, o.sapo_temperature_neg))
    tau_N = torch.where(positive_N, pos, neg)
    loss_N = -4 / tau_N * torch.sigmoid(tau_N * (ratio_N - 1)) * x.advantages_N
    never_N = torch.zeros_like(positive_N)
    return TokenLosses(loss_N, ratio_N.detach(), clip_low_N=never_N, clip_high_N=never_N)


LOSS = PolicyLoss(token_loss, sequence_mean, by_token=True)
