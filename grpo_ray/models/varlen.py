"""Packed attention in one kernel on GPUs: torch's variable-length attention, over sequences that may share their prompts.

    row      [prompt][rest 1][rest 2][whole sequence]           N tokens, each a query once
    keys     [prompt][rest 1][prompt][rest 2][whole sequence]   M rows, gathered from the N

A prompt's queries belong to the first sequence that has it. The causal mask of a sequence with fewer queries than keys is aligned
to their ends, so each rest sees its whole prompt. Legend: N tokens of the row, M rows of keys, H heads, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_DTYPES = (torch.bfloat16, torch.float16)
_MAX_HEAD_SIZE = 256
_MIN_CAPABILITY = (8, 0)
"""Ampere; the kernel has no code for GPUs before it."""


@dataclass(frozen=True)
class Repeats:
    """The rows of the keys, where some tokens of the row are in several sequences."""

    token_M: Tensor
    """[M] int64, the token of each row."""
    row_M: Tensor
    """[M] int64, the rows in the order of their tokens."""
    count_N: Tensor
    """[N] int64, the number of rows of each token."""

    @classmethod
    def of(cls, token_M: Tensor, num_tokens: int, device: torch.device) -> Repeats:
        rows = token_M.argsort(stable=True)
        counts = token_M.bincount(minlength=num_tokens)
        return cls(*(x.to(device, non_blocking=True) for x in (token_M, rows, counts)))


@dataclass(frozen=True)
class VarlenLayout:
    """What the kernel is told of the sequences of a row, S of them with queries of their own."""

    cu_queries: Tensor
    """[S + 1] int32, where the queries of each sequence begin, and the end."""
    cu_keys: Tensor
    """[S + 1] int32, the same of the keys."""
    max_queries: int
    max_keys: int
    repeats: Repeats | None
    """The rows of the keys; None: the row itself, no part is shared."""

    @classmethod
    def of(cls, lengths: Sequence[int], sequences: Sequence[tuple[int, ...]], device: torch.device) -> VarlenLayout:
        """The layout of parts of these lengths, given which of them each sequence consists of.

        Raises:
            ValueError: a part that no sequence before has is not at a sequence's end, or the parts are not in the row's order.
        """
        queries, keys, seen = [], [], 0
        for parts in sequences:
            own = [part for part in parts if part >= seen]
            if own != list(parts[len(parts) - len(own) :]) or own != list(range(seen, seen + len(own))):
                raise ValueError(
                    f"the parts {parts} of a packed sequence are not the next of the row, after shared ones"
                )
            # A sequence that adds nothing has been computed: all of it is the beginning of another.
            if own:
                seen += len(own)
                queries.append(sum(lengths[part] for part in own))
                keys.append(parts)
        num_keys = [sum(lengths[part] for part in parts) for parts in keys]
        repeats = None
        if queries != num_keys:
            tokens = torch.arange(sum(lengths)).split(list(lengths))
            rows = torch.cat([tokens[part] for part in chain.from_iterable(keys)])
            repeats = Repeats.of(rows, sum(lengths), device)
        return cls(_ends(queries, device), _ends(num_keys, device), max(queries), max(num_keys), repeats)


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)


def has_kernel(query: Tensor, dropout: float) -> bool:
    """Whether the kernel takes such queries [.., D]: half precision on a GPU that it has code for, without dropout."""
    return (
        query.is_cuda
        and query.dtype in _DTYPES
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= _MAX_HEAD_SIZE
        and dropout == 0.0
        and torch.cuda.get_device_capability(query.device) >= _MIN_CAPABILITY
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence.

    Args:
        query: [N, H, D].
        key: [N, key heads, D].
        value: [N, key heads, D].
        window: how many tokens a query sees, itself included; None: all before it.

    Returns:
        [N, H, D].
    """
    if layout.repeats is not None:
        key, value = (repeated(x, layout.repeats) for x in (key, value))
    out = varlen_attn(
        query,
        key,
        value,
        layout.cu_queries,
        layout.cu_keys,
        layout.max_queries,
        layout.max_keys,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)  # a pair where the logarithms of the sums are asked for
    return out


def repeated(x_N: Tensor, repeats: Repeats) -> Tensor:
    """[M, ..] each row's token of x [N, ..]. The gradient of a token is the sum over its rows, in fp32 and in a fixed order."""
    out: Tensor = _Repeated.apply(x_N, repeats)
    return out


class _Repeated(torch.autograd.Function):
    """The gather. Its gradient by autograd would be added up with atomics, in the order that comes and in half precision."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, repeats: Repeats) -> Tensor:
        ctx.repeats = repeats
        return x_N.index_select(0, repeats.token_M)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None]:
        repeats: Repeats = ctx.repeats
        rows_M = grad_M.index_select(0, repeats.row_M)
        exact_M = rows_M.float() if rows_M.dtype in _DTYPES else rows_M
        # `unsafe` only skips a check of the lengths, which would wait for the GPU.
        sums_N = torch.segment_reduce(exact_M, "sum", lengths=repeats.count_N, axis=0, unsafe=True)
        return sums_N.to(grad_M.dtype), None
