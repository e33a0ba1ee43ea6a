"""The declaration of a recipe's own loss: over what its ratio is taken, and how its tokens are averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from grpo_ray.algorithm.losses import aggregation
from grpo_ray.algorithm.losses.aggregation import Normalizers

F = TypeVar("F", bound=Callable[..., Any])
Ratio = Literal["token", "sequence"]
Average = Literal["sequence_mean", "sequence_sum", "fixed_length", "token_mean"]

WEIGHTS: dict[str, Callable[[int, Normalizers], float]] = {
    "sequence_mean": aggregation.sequence_mean,
    "sequence_sum": aggregation.sequence_sum,
    "fixed_length": aggregation.fixed_length,
    "token_mean": aggregation.token_mean,
}


@dataclass(frozen=True)
class Declared:
    """What a loss declares; the defaults are those of loss grpo."""

    ratio: Ratio = "token"
    average: Average = "sequence_mean"

    def __post_init__(self) -> None:
        if self.ratio not in ("token", "sequence"):
            raise ValueError(f"policy_loss: ratio is {self.ratio!r}; it is token or sequence")
        if self.average not in WEIGHTS:
            raise ValueError(f"policy_loss: average is {self.average!r}; it is one of {', '.join(WEIGHTS)}")


def policy_loss(*, ratio: Ratio = "token", average: Average = "sequence_mean") -> Callable[[F], F]:
    """Decorator of a loss.

    Args:
        ratio: sequence: one for all tokens of a sequence, as in GSPO; corrections and advantages by the token are refused then.
        average: how the losses of tokens become one number, a name of `aggregation.py`.
    """
    declared = Declared(ratio, average)

    def declare(function: F) -> F:
        function.policy_loss = declared  # type: ignore[attr-defined]
        return function

    return declare


def declared_by(function: object) -> Declared:
    found = getattr(function, "policy_loss", Declared())
    assert isinstance(found, Declared)
    return found
