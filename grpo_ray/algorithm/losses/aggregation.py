"""Loss aggregation: the weight of every token of a sequence, given the whole optimizer step.

The words in brackets are verl's `loss_agg_mode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Normalizers:
    """Normalizers of one optimizer step, over all learner ranks and micro-batches. No defaults: leaving one out would change the
    gradient.
    """

    num_sequences: int
    """The number of sequences that take part in the loss."""
    num_tokens: int
    """The number of their completion tokens."""
    max_completion_length: int
    """The longest possible completion, in tokens."""

    @classmethod
    def unit(cls, max_completion_length: int) -> Normalizers:
        """Normalizers of a partial batch: its weights are those of the whole batch times a factor common to all tokens."""
        return cls(1, 1, max_completion_length)


def weights_of_sequences(
    weight: Callable[[int, Normalizers], float],
    token_weights_S: NDArray[np.float32],
    lengths_S: NDArray[np.int64],
    unit: Normalizers,
) -> NDArray[np.float32]:
    """[S] the weight of each whole sequence in a mean over all sequences of the optimizer step, or over all their tokens if that is
    what `weight` does.

    Args:
        token_weights_S: [S] the weight of one of its tokens, as `weight` gave it.
        unit: see `Normalizers.unit`.
    """
    factors_S = token_weights_S / np.array([weight(int(length), unit) for length in lengths_S])
    return np.asarray(factors_S * lengths_S if weight is token_mean else factors_S, np.float32)


def sequence_mean(length: int, n: Normalizers) -> float:
    """Mean over sequences of the mean over their tokens [seq-mean-token-mean]. DeepSeekMath 2402.03300, eq. 3."""
    return 1.0 / (n.num_sequences * max(length, 1))


def sequence_sum(_length: int, n: Normalizers) -> float:
    """Mean over sequences of the sum over their tokens [seq-mean-token-sum]. DeepSeek-R1 2501.12948, eq. 1."""
    return 1.0 / n.num_sequences


def fixed_length(_length: int, n: Normalizers) -> float:
    """Sum of tokens / (sequences x longest possible completion) [seq-mean-token-sum-norm]: no bias towards short
    answers. Dr. GRPO 2503.20783, section 3.2.
    """
    return 1.0 / (n.num_sequences * n.max_completion_length)


def token_mean(_length: int, n: Normalizers) -> float:
    """Mean over all tokens of the step [token-mean]. DAPO 2503.14476, eq. 8 (there of a prompt's group; in verl, TRL
    and here of the batch).
    """
    return 1.0 / n.num_tokens
