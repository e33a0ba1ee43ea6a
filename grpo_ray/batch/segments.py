"""Which token of a packed micro-batch belongs to which sequence. N tokens, S sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Sequences lie end to end and are whole: all of a sequence's completion tokens are in the micro-batch."""

    index_N: Tensor
    """[N] int64, 0 .. S-1, ascending."""
    lengths_S: Tensor
    """[S] int64, completion tokens of each."""

    @classmethod
    def of(cls, index_N: Tensor) -> Segments:
        return cls(index_N, index_N.bincount())

    def sum(self, values_N: Tensor) -> Tensor:
        """[S]."""
        # Unlike index_add, the same bits every time on GPUs too. `unsafe` only skips a check of the lengths.
        return torch.segment_reduce(values_N, "sum", lengths=self.lengths_S, unsafe=True)

    def mean(self, values_N: Tensor) -> Tensor:
        """[S]."""
        return self.sum(values_N) / self.lengths_S

    def spread(self, values_S: Tensor) -> Tensor:
        """[N]: each sequence's value at each of its tokens."""
        return values_S[self.index_N]
