"""What a policy loss is made of, and what it gives: the contract of the files that `table.py` lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.batch.segments import Segments


@dataclass(frozen=True)
class PolicyInputs:
    """Tokens of one micro-batch."""

    logps_N: Tensor
    """[N] log-probabilities under the weights being trained; the only one with a gradient."""
    old_logps_N: Tensor
    """[N] those that the ratio is taken to."""
    advantages_N: Tensor
    """[N], the same at every token of a sequence."""
    segments: Segments


@dataclass(frozen=True)
class LossOptions:
    """The numbers of `algorithm` that a policy loss may use. No defaults: those are in the schema."""

    epsilon_low: float
    epsilon_high: float
    dual_clip_c: float | None
    cispo_max_ratio: float
    sapo_temperature_pos: float
    sapo_temperature_neg: float


@dataclass(frozen=True)
class TokenLosses:
    """[N] each."""

    loss_N: Tensor
    """Before the token's weight."""
    ratio_N: Tensor
    """The probability ratio that the objective uses, detached."""
    clip_low_N: Tensor
    """Bool: cut off by the lower bound (a negative advantage, and already less likely)."""
    clip_high_N: Tensor
    """Bool: cut off by the upper bound (a positive advantage, and already more likely)."""


@dataclass(frozen=True)
class PolicyLoss:
    token_loss: Callable[[PolicyInputs, LossOptions], TokenLosses]
    weight: Callable[[int, Normalizers], float]
    """Of each token of a sequence of so many completion tokens."""
