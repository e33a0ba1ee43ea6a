"""GSPO, 2507.18071, eq. 5 and 7: the sequence's ratio by the token, s = exp(mean_t log r_t), clipped; a mean over
sequences. TRL: `importance_sampling_level="sequence"` with `loss_type="grpo"`.
"""

from __future__ import annotations

from grpo_ray.algorithm.losses.aggregation import sequence_mean
from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, PolicyLoss, TokenLosses
from grpo_ray.algorithm.losses.ppo_clip import clipped


def token_loss(x: PolicyInputs, o: LossOptions) -> TokenLosses:
    ratio_N = x.segments.spread(bounded_exp(x.segments.mean(x.logps_N - x.old_logps_N)))
    return clipped(ratio_N, x.advantages_N, o)


LOSS = PolicyLoss(token_loss, sequence_mean)
