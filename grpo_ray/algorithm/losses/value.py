"""The critic's loss of PPO, clipped around the values of the version that sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float


def value_loss(
    values_N: Float[Tensor, "N"],
    old_values_N: Float[Tensor, "N"],
    returns_N: Float[Tensor, "N"],
    weights_N: Float[Tensor, "N"],
    *,
    clip_range: float,
) -> Float[Tensor, ""]:
    """sum_t w_t 0.5 max((V - ret)^2, (clip(V, V_old - clip_range, V_old + clip_range) - ret)^2).

    As in OpenAI's baselines and in verl; the paper of PPO (1707.06347) does not clip values.

    Args:
        values_N: [N] the critic's, with gradient.
        old_values_N: [N] its values when the advantages were computed.
        returns_N: [N].
        weights_N: [N], with the global normalizer inside.
        clip_range: how far a value may move from the old one.
    """
    bounded_N = torch.minimum(torch.maximum(values_N, old_values_N - clip_range), old_values_N + clip_range)
    worse_N = torch.maximum((values_N - returns_N).square(), (bounded_N - returns_N).square())
    return 0.5 * (weights_N * worse_N).sum()
