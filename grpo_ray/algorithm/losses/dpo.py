"""Direct preference optimisation: the policy is its own reward model. P pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import logsigmoid

if TYPE_CHECKING:
    from jaxtyping import Float


def dpo_loss(
    chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"], weights_P: Float[Tensor, "P"], *, beta: float
) -> Float[Tensor, ""]:
    """sum_p w_p * -log sigmoid(beta (d_w - d_l)), d = logp - ref. DPO 2305.18290, eq. 7; TRL's `sigmoid`.

    Args:
        chosen_P: [P] log-probability of the whole chosen completion, minus the reference's.
        rejected_P: [P], likewise.
        weights_P: [P], 1 / pairs of the whole step.
        beta: how much a departure from the reference costs.
    """
    return -(weights_P * logsigmoid(beta * (chosen_P - rejected_P))).sum()


def ipo_loss(
    chosen_P: Float[Tensor, "P"], rejected_P: Float[Tensor, "P"], weights_P: Float[Tensor, "P"], *, beta: float
) -> Float[Tensor, ""]:
    """sum_p w_p (d_w - d_l - 1 / (2 beta))^2: the margin is a target, not a lower bound. IPO 2310.12036, eq. 17; TRL's `ipo`.

    Args:
        chosen_P: [P] as in `dpo_loss`, but a mean over the completion's tokens (TRL's reading, confirmed by the authors).
        rejected_P: [P], likewise.
    """
    return (weights_P * (chosen_P - rejected_P - 1 / (2 * beta)).square()).sum()
