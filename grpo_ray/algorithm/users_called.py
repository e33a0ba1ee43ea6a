"""The loss and the advantage of a recipe, built in or its own: the latter are held to the contract of the former at each call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_ray.algorithm.advantages import Advantage, Rewards
from grpo_ray.algorithm.declare import WEIGHTS
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, PolicyLoss, TokenLosses
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.algorithm.users import CONTRACT, PAGE, check_ratio, declared_loss, loaded
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.base import is_users
from grpo_ray.errors import ConfigError, kind_and_line

TokenLoss = Callable[[PolicyInputs, LossOptions], TokenLosses]


def loss_of(a: AlgorithmConfig) -> PolicyLoss:
    """The loss that `algorithm.loss` names. Raises ConfigError as `check_users` does."""
    if not is_users(a.loss):
        return POLICY_LOSSES[a.loss]
    declared = declared_loss(a)
    check_ratio(a, declared.ratio)
    function: TokenLoss = loaded("loss", a.loss, a.package)
    return PolicyLoss(functools.partial(_called_loss, a.loss, function), WEIGHTS[declared.average])


def advantage_of(a: AlgorithmConfig) -> str | Advantage:
    """What compares the rewards of a group: the name of a built-in, or a function of the recipe's own."""
    if not is_users(a.advantage):
        return a.advantage
    return functools.partial(_called_advantage, a.advantage, loaded("advantage", a.advantage, a.package))


def _called_loss(name: str, function: TokenLoss, x: PolicyInputs, o: LossOptions) -> TokenLosses:
    try:
        out = function(x, o)
    except Exception as e:
        raise ConfigError(f"algorithm.loss {name!r} failed: {kind_and_line(e)}") from e
    if not isinstance(out, TokenLosses):
        raise ConfigError(f"algorithm.loss {name!r} gave a {type(out).__name__}; {CONTRACT['loss']}, see {PAGE}")
    for field in ("loss_N", "ratio_N", "clip_low_N", "clip_high_N"):
        _check_shape(f"algorithm.loss {name!r}: {field}", getattr(out, field), x.logps_N)
    if x.logps_N.requires_grad and not out.loss_N.requires_grad:
        raise ConfigError(
            f"algorithm.loss {name!r}: loss_N has no gradient, so nothing would be learned; compute it from inputs.logps_N, not "
            "detached"
        )
    return out


def _called_advantage(name: str, function: Advantage, rewards: Rewards) -> Tensor:
    try:
        out = function(rewards)
    except Exception as e:
        raise ConfigError(f"algorithm.advantage {name!r} failed: {kind_and_line(e)}") from e
    _check_shape(f"algorithm.advantage {name!r}: what it gives", out, rewards.raw_PG)
    out = out.to(rewards.raw_PG.dtype).masked_fill(~rewards.mask_PG, 0.0)
    if not bool(torch.isfinite(out).all()):
        raise ConfigError(
            f"algorithm.advantage {name!r} gave NaN or infinity; where a group's rewards are all equal, add eps before dividing"
        )
    return out


def _check_shape(what: str, found: Any, like: Tensor) -> None:
    if not isinstance(found, Tensor) or found.shape != like.shape:
        got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ConfigError(f"{what} is {got}; expected a tensor of shape {list(like.shape)}")
