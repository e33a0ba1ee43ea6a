"""KL to the reference model, estimated from the sampled tokens. d = logps - ref_logps, r = exp(logps - old_logps); names after
Schulman's note "Approximating KL" and verl.

As a loss term k1 and k3 have a biased gradient: that of k1 is 0 on average, that of k3 belongs to the reverse
divergence. k2 has the right one on-policy (2506.09477), `k3+` shows the value of k3 and has the gradient of k2, and
`k3_unbiased` is right off-policy too, with a gradient through r (DeepSeek-V3.2 2512.02556, section 3.1; TRL's
`use_bias_correction_kl`). In a reward (`algorithm.kl_in`) an estimate is only a number: k1 has the right mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.algorithm.losses.bounds import bounded_exp, bounded_k3

if TYPE_CHECKING:
    from jaxtyping import Float


def k1(d_N: Float[Tensor, "N"], _log_ratio_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    return d_N


def k2(d_N: Float[Tensor, "N"], _log_ratio_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    return 0.5 * d_N.square()


def k3(d_N: Float[Tensor, "N"], _log_ratio_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """DeepSeekMath 2402.03300, eq. 4; bounded where a token is e^20 times as likely under the reference as under the policy."""
    return bounded_k3(d_N)


def k3_plus(d_N: Float[Tensor, "N"], log_ratio_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    slope_N = k2(d_N, log_ratio_N)
    return slope_N - slope_N.detach() + k3(d_N, log_ratio_N).detach()


def k3_unbiased(d_N: Float[Tensor, "N"], log_ratio_N: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    return bounded_exp(log_ratio_N) * k3(d_N, log_ratio_N)


KL_ESTIMATORS: dict[str, Callable[[Float[Tensor, "N"], Float[Tensor, "N"]], Float[Tensor, "N"]]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "k3+": k3_plus,
    "k3_unbiased": k3_unbiased,
}
"""The estimators that `algorithm.kl_estimator` names: (d [N], log r [N]) -> [N]."""


def kl_of_tokens(
    old_logps_N: Float[Tensor, "N"], ref_logps_N: Float[Tensor, "N"], *, estimator: str
) -> Float[Tensor, "N"]:
    """[N] KL(old || reference), to be subtracted from rewards. Arguments [N]; the estimator is k1, k2 or k3."""
    d_N = old_logps_N - ref_logps_N
    return KL_ESTIMATORS[estimator](d_N, torch.zeros_like(d_N)).detach()


def kl_loss(
    logps_N: Float[Tensor, "N"],
    ref_logps_N: Float[Tensor, "N"],
    old_logps_N: Float[Tensor, "N"],
    weights_N: Float[Tensor, "N"],
    *,
    estimator: str,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return sum_t w_t KL_t, before beta; and the plain sum of KL_t over the tokens, detached, for the metrics.

    Args:
        logps_N: [N] log-probabilities under the weights being trained.
        ref_logps_N: [N] log-probabilities under the reference model, without gradient.
        old_logps_N: [N] the denominator of the ratio, without gradient.
        weights_N: [N], with the global normalizer inside.
        estimator: a name of KL_ESTIMATORS.
    """
    kl_N = KL_ESTIMATORS[estimator](logps_N - ref_logps_N, logps_N - old_logps_N)
    return (weights_N * kl_N).sum(), kl_N.detach().sum()
