"""How token losses become one number: the weight of every token of a sequence, given the whole optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Normalizers:
    """Of one optimizer step, over all learners and micro-batches. No defaults: leaving one out would change the
    gradient.
    """

    num_sequences: int
    """Sequences that take part in the loss."""
    num_tokens: int
    """Their completion tokens."""
    max_completion_length: int
    """The sampler's limit, in tokens."""


def grpo(length: int, n: Normalizers) -> float:
    """Mean over sequences of the mean over their tokens. DeepSeekMath 2402.03300, eq. 3."""
    return 1.0 / (n.num_sequences * max(length, 1))


def dr_grpo(length: int, n: Normalizers) -> float:
    """Sum of tokens / (sequences x longest possible completion): no bias towards short answers. 2503.20783."""
    return 1.0 / (n.num_sequences * n.max_completion_length)


def dapo(length: int, n: Normalizers) -> float:
    """Mean over all tokens of the step. 2503.14476, eq. 8 (there of a prompt's group; in verl, TRL and here of the
    batch).
    """
    return 1.0 / n.num_tokens


AGGREGATIONS: dict[str, Callable[[int, Normalizers], float]] = {"grpo": grpo, "dr_grpo": dr_grpo, "dapo": dapo}
"""`algorithm.loss` -> weight of each token of a sequence of `length` completion tokens."""
