"""KL to the reference model, estimated from the sampled tokens. d = theta - ref; names after Schulman's note
"Approximating KL".

As a loss term k1 and k3 have a biased gradient; k2 has the right one on-policy.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def k1(d_N: Tensor) -> Tensor:
    return d_N


def k2(d_N: Tensor) -> Tensor:
    return 0.5 * d_N.square()


def k3(d_N: Tensor) -> Tensor:
    """DeepSeekMath 2402.03300, eq. 4."""
    return (-d_N).exp() + d_N - 1


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""`algorithm.kl_estimator`."""


def kl_loss(theta_N: Tensor, ref_N: Tensor, weights_N: Tensor, *, estimator: str) -> tuple[Tensor, Tensor]:
    """sum_t w_t KL_t, before beta; and the plain sum of KL_t over the tokens, detached, for the metrics.

    Args:
        theta_N: [N] log-probabilities under the weights being trained.
        ref_N: [N] those of the reference model, without gradient.
        weights_N: [N], with the global normalizer inside.
        estimator: `k1`, `k2` or `k3`.
    """
    kl_N = KL_ESTIMATORS[estimator](theta_N - ref_N)
    return (weights_N * kl_N).sum(), kl_N.detach().sum()
