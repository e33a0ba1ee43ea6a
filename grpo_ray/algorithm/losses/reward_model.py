"""Losses of a reward model: which of two answers is better, or how good one is. P pairs, S sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

if TYPE_CHECKING:
    from jaxtyping import Float


def bradley_terry_loss(
    chosen_P: Float[Tensor, "P"],
    rejected_P: Float[Tensor, "P"],
    margins_P: Float[Tensor, "P"],
    weights_P: Float[Tensor, "P"],
) -> Float[Tensor, ""]:
    """sum_p w_p * -log sigmoid(s_w - s_l - m). InstructGPT 2203.02155, eq. 1; the margin is Llama 2's (2307.09288, eq. 2).

    Args:
        chosen_P: [P] scores.
        rejected_P: [P] scores.
        margins_P: [P] by how much the scores should differ; 0: no margin.
        weights_P: [P], 1 / pairs of the whole step.
    """
    return -(weights_P * logsigmoid(chosen_P - rejected_P - margins_P)).sum()


def point_loss(
    scores_S: Float[Tensor, "S"], labels_S: Float[Tensor, "S"], weights_S: Float[Tensor, "S"], *, kind: str
) -> Float[Tensor, ""]:
    """The loss of single answers. `bce`: the score is the logit of a label in [0, 1] (safe or not, DeepSeek-R1's safety model).
    `mse`: the score is the label.
    """
    if kind == "mse":
        return (weights_S * (scores_S - labels_S).square()).sum()
    return (weights_S * binary_cross_entropy_with_logits(scores_S, labels_S, reduction="none")).sum()
