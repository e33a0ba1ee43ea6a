"""Segments: the sequence of each token of a packed micro-batch. N tokens, S sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@dataclass(frozen=True)
class Segments:
    """Sequences that lie end to end and are whole: all completion tokens of a sequence are in the micro-batch."""

    index_N: Int[Tensor, "N"]
    """[N] int64, the sequence of each token, 0 .. S-1, ascending."""
    lengths_S: Int[Tensor, "S"]
    """[S] int64, the number of completion tokens of each sequence."""

    @classmethod
    def of(cls, index_N: Int[Tensor, "N"]) -> Segments:
        return cls(index_N, index_N.bincount())

    def sum(self, values_N: Float[Tensor, "N"]) -> Float[Tensor, "S"]:
        """[S] the sum over each sequence."""
        # Unlike index_add, this gives the same bits every time on GPUs too. `unsafe` only skips a check of the lengths.
        return torch.segment_reduce(values_N, "sum", lengths=self.lengths_S, unsafe=True)

    def mean(self, values_N: Float[Tensor, "N"]) -> Float[Tensor, "S"]:
        """[S] the mean over each sequence."""
        return self.sum(values_N) / self.lengths_S

    def spread(self, values_S: Shaped[Tensor, "S"]) -> Shaped[Tensor, "N"]:
        """[N] each sequence's value at each of its tokens."""
        return values_S[self.index_N]
