"""Cross-entropy of demonstrated tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def sft_loss(logps_N: Float[Tensor, "N"], weights_N: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    """sum_t w_t * -log p_t, w_t = 1 / completion tokens of the whole step, as in `losses/dapo.py`.

    Args:
        logps_N: [N] log-probabilities of the demonstrated tokens.
        weights_N: [N], with the global normalizer inside.
    """
    return -(weights_N * logps_N).sum()
