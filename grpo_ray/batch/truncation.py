"""Truncated distributions: the tokens that can be sampled under top_p, top_k and min_p, so that the learner normalises over the
same ones.

Samples come not from the policy but from the policy restricted to a set of tokens and renormalised over it:

    pi~(a) = pi(a) / sum_{b in S} pi(b),    a in S

The rollout engine reports log pi~, so the learner computes it too: S is computed once, from the logits of the policy that sampled,
and every pass over these tokens (old, current and reference policy) renormalises over the same S, without a gradient through its
choice. DeepSeek-V3.2 calls it "keep sampling mask" (2512.02556, section 3.1).

C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.types import Truncation

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

DROPPED = -1e30
"""The logit of a token outside the set: its probability is 0, and 0 times its logarithm is 0 too."""
_CANDIDATES = 1024
"""The number of likeliest tokens (or top_k) that are sorted at first; a row whose top_p reaches further is sorted whole."""
_PIECES = 8
"""The number of pieces in which a chunk is processed, since sorting takes several times the memory of its input."""


def keep_mask(
    logits_CV: Float[Tensor, "C V"], targets_C: Int[Tensor, "C"], truncation: Truncation
) -> Bool[Tensor, "C V"]:
    """Compute the set of each row as vLLM does: min_p first, then top_k of what is left, then top_p of that, renormalised.

    Of tokens tied with the last of the top_k all are kept on CPUs, and as many as make k on GPUs. The sampled token is always in
    its set, whatever rounding says.

    Args:
        logits_CV: [C, V] fp32, after the temperature.
        targets_C: [C], the sampled tokens.
        truncation: the options that truncate.

    Returns:
        [C, V] bool.
    """
    rows = max(1, -(-len(logits_CV) // _PIECES))
    pieces = zip(logits_CV.split(rows), targets_C.split(rows), strict=True)
    exact_k = logits_CV.is_cuda
    masks = [_with_target(_keep(logits, truncation, exact_k), logits, targets) for logits, targets in pieces]
    return torch.cat(masks)


# Comparisons are negated where a NaN has to stay in the set: then the loss is NaN too, and the error names it.


def _keep(logits: Float[Tensor, "C V"], truncation: Truncation, exact_k: bool) -> Bool[Tensor, "C V"]:
    least = logits.amin(dim=1, keepdim=True)
    if truncation.min_p > 0:
        least = torch.maximum(least, logits.amax(dim=1, keepdim=True) + math.log(truncation.min_p))
    first = None
    if 0 < truncation.top_k < logits.shape[1]:
        values, first = logits.topk(truncation.top_k, dim=1)
        least = torch.maximum(least, values[:, -1:])
    mask = ~(logits < least)
    if exact_k and first is not None:
        mask &= torch.zeros_like(mask).scatter_(1, first, True)
    if truncation.top_p == 1:
        return mask
    candidates = min(_CANDIDATES, truncation.top_k or _CANDIDATES, logits.shape[1])
    return _nucleus(logits.masked_fill(~mask, DROPPED), truncation.top_p, candidates)


def _nucleus(logits: Float[Tensor, "C V"], top_p: float, candidates: int) -> Bool[Tensor, "C V"]:
    """The smallest set of the likeliest tokens that together have at least `top_p`: those preceded by less than that."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    total = logits.logsumexp(dim=1, keepdim=True)
    values, places = logits.topk(candidates, dim=1)
    mask.scatter_(1, places, _first(values, total, top_p))
    if values.shape[1] < logits.shape[1]:
        further = ((values - total).exp_().sum(dim=1) < top_p).nonzero()[:, 0]
        values, places = logits[further].sort(dim=1, descending=True)
        mask[further] = torch.zeros_like(values, dtype=torch.bool).scatter_(
            1, places, _first(values, total[further], top_p)
        )
    return mask


def _first(values: Float[Tensor, "C K"], total: Float[Tensor, "C 1"], top_p: float) -> Bool[Tensor, "C K"]:
    probs = (values - total).exp_()
    return ~(probs.cumsum(dim=1) - probs >= top_p) & ~(values <= DROPPED)


def _with_target(
    mask: Bool[Tensor, "C V"], logits: Float[Tensor, "C V"], targets: Int[Tensor, "C"]
) -> Bool[Tensor, "C V"]:
    """Add the sampled token, which was kept; among tokens tied with the last that is kept it replaces another."""
    missing = (~mask.gather(1, targets[:, None])[:, 0]).nonzero()[:, 0]
    own = targets[missing]
    tied = mask[missing] & (logits[missing] == logits[missing, own][:, None])
    mask[missing, tied.int().argmax(dim=1)] &= ~tied.any(dim=1)
    mask[missing, own] = True
    return mask


@dataclass(frozen=True)
class _Chunk:
    """A compact mask: the columns of the kept tokens, or where that is larger, one bit for each token."""

    counts_C: Int[Tensor, "C"] | None
    columns: Tensor
    """The columns as int32; without counts, bits as uint8 [C, V / 8]."""
    vocab_size: int

    @classmethod
    def of(cls, mask_CV: Bool[Tensor, "C V"]) -> _Chunk:
        num_rows, vocab_size = mask_CV.shape
        counts_C = mask_CV.sum(dim=1)
        if int(counts_C.sum()) * 32 <= num_rows * vocab_size:
            return cls(counts_C, mask_CV.nonzero()[:, 1].int(), vocab_size)
        padded = torch.nn.functional.pad(mask_CV, (0, -vocab_size % 8)).view(num_rows, -1, 8)
        return cls(None, (padded * _bits(mask_CV)).sum(dim=2, dtype=torch.uint8), vocab_size)

    def mask(self) -> Bool[Tensor, "C V"]:
        """[C, V] the mask as bool."""
        if self.counts_C is None:
            bits = (self.columns[:, :, None] & _bits(self.columns)) != 0
            return bits.flatten(1)[:, : self.vocab_size]
        num_rows = len(self.counts_C)
        mask_CV = torch.zeros((num_rows, self.vocab_size), dtype=torch.bool, device=self.columns.device)
        rows = torch.arange(num_rows, device=self.columns.device).repeat_interleave(self.counts_C)
        mask_CV[rows, self.columns.long()] = True
        return mask_CV


def _bits(like: Tensor) -> Tensor:
    return torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=like.device)


class TokenSets:
    """The sets of a micro-batch's tokens: computed in the first pass over them, and reused in every later one.

    They take at most an eighth of a byte for each row and token of the vocabulary, which only very flat distributions need.
    """

    def __init__(self, truncation: Truncation) -> None:
        self.truncation = truncation
        self._chunks: dict[int, _Chunk] = {}
        """Chunks by their first row."""
        self.made = False
        """Whether there was a pass over these tokens; a rank's slice may hold no token that is predicted."""

    def drop(
        self, logits_CV: Float[Tensor, "C V"], targets_C: Int[Tensor, "C"], first_row: int
    ) -> Float[Tensor, "C V"]:
        """The logits of the chunk that begins with this row, DROPPED outside its sets; the input is overwritten."""
        if first_row not in self._chunks:
            self._chunks[first_row] = _Chunk.of(keep_mask(logits_CV, targets_C, self.truncation))
        return logits_CV.masked_fill_(~self._chunks[first_row].mask(), DROPPED)
