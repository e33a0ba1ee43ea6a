"""GRPO as DeepSeek-R1 writes it (2501.12948, eq. 1): the ratio of the whole sequence, R = prod_t r_t, clipped, a mean
over sequences, and no 1 / |o|.

The sequence's loss is divided over its tokens, whose weight is 1 / sequences. Terms that are given by token (the KL, the
entropy) are thus summed over a sequence: by the chain rule sum_t KL_t estimates the same divergence as R1's
exp(-D) + D - 1 with D = sum_t d_t, which overflows on long answers.
"""

from __future__ import annotations

from dataclasses import replace

from grpo_ray.algorithm.losses.aggregation import sequence_sum
from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, PolicyLoss, TokenLosses
from grpo_ray.algorithm.losses.ppo_clip import clipped


def token_loss(x: PolicyInputs, o: LossOptions) -> TokenLosses:
    ratio_N = x.segments.spread(bounded_exp(x.segments.sum(x.logps_N - x.old_logps_N)))
    whole = clipped(ratio_N, x.advantages_N, o)
    return replace(whole, loss_N=whole.loss_N / x.segments.spread(x.segments.lengths_S))


LOSS = PolicyLoss(token_loss, sequence_sum)
