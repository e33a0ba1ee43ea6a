"""Probability ratios that stay finite in fp32, and so do their gradients.

exp(x) is infinite above x = 88.7, and where a clip cuts it off, its gradient is 0 x infinity: NaN. So x is bounded before, as
verl does (`negative_approx_kl`, in `core_algos.py`), and beyond the bound the gradient is 0: where a clip or an advantage of 0
cuts the ratio off, that is what the formula says; on the lower side the formula's is smaller than 2.1e-9. Where nothing cuts it
off (A < 0, and the policy likes the token e^20 times as much as before), the loss is e^20 |A| and pulls no more, as in verl;
`dual_clip_c` bounds it long before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

LOG_RATIO_BOUND = 20.0
"""The bound of a log-ratio in nats: ratios lie in [2.1e-9, 4.9e8]."""


def bounded_exp(log_ratio: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """exp(log_ratio), with the logarithm bounded by +-LOG_RATIO_BOUND; a NaN stays one."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def bounded_k3(d: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """exp(-d) + d - 1, with d at least -LOG_RATIO_BOUND. It grows like d on the other side, which overflows nothing."""
    above = d.clamp(min=-LOG_RATIO_BOUND)
    return (-above).exp() + above - 1
