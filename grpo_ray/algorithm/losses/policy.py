"""The contract of a policy loss: its inputs, options and results, for the files that `table.py` lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.batch.segments import Segments

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass(frozen=True)
class PolicyInputs:
    """The completion tokens of one micro-batch."""

    logps_N: Float[Tensor, "N"]
    """[N] log-probabilities under the weights being trained; the only one with a gradient."""
    old_logps_N: Float[Tensor, "N"]
    """[N] log-probabilities in the denominator of the ratio."""
    advantages_N: Float[Tensor, "N"]
    """[N] advantages, the same at every token of a sequence."""
    segments: Segments


@dataclass(frozen=True)
class LossOptions:
    """The options of `algorithm` that a policy loss may use. Their defaults are in the schema."""

    epsilon_low: float
    epsilon_high: float
    dual_clip_c: float | None
    cispo_max_ratio: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float


@dataclass(frozen=True)
class TokenLosses:
    """The result of a policy loss, [N] each."""

    loss_N: Float[Tensor, "N"]
    """The loss of each token, before its weight."""
    ratio_N: Float[Tensor, "N"]
    """The probability ratio that the objective uses, detached."""
    clip_low_N: Bool[Tensor, "N"]
    """Whether the token is clipped at the lower bound (a negative advantage, and already less likely)."""
    clip_high_N: Bool[Tensor, "N"]
    """Whether the token is clipped at the upper bound (a positive advantage, and already more likely)."""


@dataclass(frozen=True)
class PolicyLoss:
    token_loss: Callable[[PolicyInputs, LossOptions], TokenLosses]
    weight: Callable[[int, Normalizers], float]
    """The weight of each token of a sequence of so many completion tokens."""
    by_token: bool = False
    """Whether the loss of a token depends on no other token's log-probability."""
