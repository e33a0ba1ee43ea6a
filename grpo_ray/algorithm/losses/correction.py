"""Rollout correction: truncated or masked importance sampling between the rollout policy (other kernels, older weights) and the
training policy, as weights of token losses without gradient. w_t = exp(old_t - rollout_t), of old_logps and rollout_logps.

`algorithm.importance_sampling`, in TRL's words (`vllm_importance_sampling_mode`):

    token_truncate     min(w_t, clip_max)                            TIS, Yao et al. 2025: clip_max 2
    token_mask         w_t within [clip_min, clip_max], else 0       MIS; IcePop, Ring-1T 2510.18855: [0.5, 5]
    sequence_truncate  the same two with prod_t w_t instead of w_t. A product of many numbers near 1 is far from 1:
    sequence_mask      on long answers this cuts off most sequences

`algorithm.geometric_mask`: sequences whose geometric mean of w, exp(mean_t(old_t - rollout_t)), lies outside the bounds are
dropped, [0.99, 1.01] (SkyRL). verl's `rollout_rs: seq_mean_k1` bounds its inverse, exp(mean_t(rollout_t - old_t)): its
`low_high` is [1 / high, 1 / low] here.

`algorithm.off_policy_mask_threshold` (TRL's name): sequences with A < 0 and mean_t(rollout_t - logps_t) above it are dropped,
DeepSeek-V3.2 2512.02556, section 3.1. Its "old" policy is given by rollout_logps, so that staleness and numerics both count.

With old_logps recomputed by the learner, a clip around them and a weight w is decoupled PPO (AReaL 2505.24298).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.algorithm.losses.bounds import bounded_exp
from grpo_ray.batch.segments import Segments

if TYPE_CHECKING:
    from jaxtyping import Float


def truncate(w_N: Float[Tensor, "N"], clip_min: float, clip_max: float) -> Float[Tensor, "N"]:
    return w_N.clamp(clip_min, clip_max)


def mask(w_N: Float[Tensor, "N"], clip_min: float, clip_max: float) -> Float[Tensor, "N"]:
    return w_N.masked_fill((w_N < clip_min) | (w_N > clip_max), 0.0)


IMPORTANCE_SAMPLING: dict[str, tuple[bool, Callable[[Tensor, float, float], Tensor]]] = {
    "token_truncate": (False, truncate),
    "token_mask": (False, mask),
    "sequence_truncate": (True, truncate),
    "sequence_mask": (True, mask),
}
"""The mode `algorithm.importance_sampling` -> (whether it is the product over the sequence, the function of the weight)."""


@dataclass(frozen=True)
class CorrectionOptions:
    importance_sampling: str | None
    clip_min: float
    clip_max: float
    geometric_mask: tuple[float, float] | None
    off_policy_mask_threshold: float | None

    @property
    def any(self) -> bool:
        return any(
            x is not None for x in (self.importance_sampling, self.geometric_mask, self.off_policy_mask_threshold)
        )

    @property
    def by_token(self) -> bool:
        """Whether a token's weight depends on no other token."""
        of_sequence = self.importance_sampling is not None and IMPORTANCE_SAMPLING[self.importance_sampling][0]
        return not of_sequence and self.geometric_mask is None and self.off_policy_mask_threshold is None


@torch.no_grad()
def correction_weights(
    logps_N: Float[Tensor, "N"],
    old_logps_N: Float[Tensor, "N"],
    rollout_logps_N: Float[Tensor, "N"],
    advantages_N: Float[Tensor, "N"],
    segments: Segments,
    o: CorrectionOptions,
) -> Float[Tensor, "N"]:
    """[N] the factor of each token's policy loss; 0 where it is masked. Arguments [N]."""
    log_w_N = old_logps_N - rollout_logps_N
    weights_N = torch.ones_like(log_w_N)
    if o.importance_sampling is not None:
        of_sequence, bound = IMPORTANCE_SAMPLING[o.importance_sampling]
        raw_N = bounded_exp(segments.spread(segments.sum(log_w_N)) if of_sequence else log_w_N)
        weights_N = bound(raw_N, o.clip_min, o.clip_max)
    if o.geometric_mask is not None:
        low, high = o.geometric_mask
        mean_S = bounded_exp(segments.mean(log_w_N))
        weights_N = weights_N.masked_fill(segments.spread((mean_S < low) | (mean_S > high)), 0.0)
    if o.off_policy_mask_threshold is not None:
        gone_S = segments.mean(rollout_logps_N - logps_N) > o.off_policy_mask_threshold
        weights_N = weights_N.masked_fill(segments.spread(gone_S) & (advantages_N < 0), 0.0)
    return weights_N


@torch.no_grad()
def correction_sums(weights_N: Float[Tensor, "N"], segments: Segments) -> dict[str, Float[Tensor, ""]]:
    """Metric sums over one micro-batch, 0-dim; a masked sequence is one without a token left."""
    return {
        "weight": weights_N.sum(),
        "weight_squared": weights_N.square().sum(),
        "masked_tokens": (weights_N == 0).sum().to(weights_N.dtype),
        "masked_sequences": (segments.sum(weights_N) == 0).sum().to(weights_N.dtype),
    }
