"""Causal attention of sequences of equal length, with what kernels lack: sinks and capped scores.

S sequences of L tokens, H heads, G key heads, D dimensions. A sink is one more logit of a head's softmax, with no value (gpt-oss);
a cap bounds the scores by cap * tanh(score / cap) before the mask (Gemma 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_ALIGNED = 8
"""The multiple that GPUs' kernels want of D."""
_SCORES = 1 << 24
"""The number of capped scores that exist at once; those of one query, if that is more."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scale: float | None,
    dropout: float,
    sinks_H: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal attention of each sequence.

    Args:
        query: [S, H, L, D].
        key: [S, G, L, D].
        value: [S, G, L, D].
        window: how many tokens a query sees, itself included; None: all before it.
        scale: the factor of the scores; None: D**-0.5.
        sinks_H: [H] or None.

    Returns:
        [S, H, L, D].
    """
    if cap is not None:
        return _capped(query, key, value, window, scale, dropout, sinks_H, cap)
    if sinks_H is not None:
        return _with_sinks(query, key, value, window, scale, dropout, sinks_H)
    return _attend(query, key, value, _window_mask(query.shape[2], window, query.device), scale, dropout)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask [L, L], True where a query may look: at itself and the window - 1 tokens before it; None: at all before it."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None, dropout: float, sinks_H: Tensor
) -> Tensor:
    """The sink as one more token before each sequence, and one more dimension in which its score alone is not 0: the kernels are
    the same, and so is their memory."""
    num, heads, length, size = query.shape
    scale = size**-0.5 if scale is None else scale
    more = _ALIGNED - size % _ALIGNED
    of_query = (sinks_H / scale).to(query.dtype)[None, :, None, None].expand(num, heads, length, 1)
    q = _before(torch.cat([query, of_query, query.new_zeros(num, heads, length, more - 1)], -1))
    k = _before(nn.functional.pad(key, (0, more)))
    k[:, :, 0, size] = 1.0
    v = _before(nn.functional.pad(value, (0, more)) if value.shape[-1] == size else value)
    mask = _window_mask(length, window, query.device)
    if mask is not None:
        mask = nn.functional.pad(mask, (1, 0, 1, 0))
        mask[:, 0] = True
    return _attend(q, k, v, mask, scale, dropout)[:, :, 1:, : value.shape[-1]]


def _before(x: Tensor) -> Tensor:
    """With a token of zeros before each sequence."""
    return nn.functional.pad(x, (0, 0, 1, 0))


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scale: float | None,
    dropout: float,
    sinks_H: Tensor | None,
    cap: float,
) -> Tensor:
    """Some queries after the others, whose scores are computed again for the backward pass."""
    num, heads, length, size = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    rows = max(1, _SCORES // (num * heads * length))
    out = []
    for start in range(0, length, rows):
        end = min(start + rows, length)
        first = 0 if window is None else max(0, start + 1 - window)
        q, k, v = query[:, :, start:end], key[:, :, first:end], value[:, :, first:end]
        options: tuple[Any, ...] = (
            sinks_H,
            start - first,
            window,
            size**-0.5 if scale is None else scale,
            cap,
            dropout,
        )
        if torch.is_grad_enabled():
            out.append(checkpoint(_block, q, k, v, *options, use_reentrant=False))
        else:
            out.append(_block(q, k, v, *options))
    return torch.cat(out, dim=2)


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks_H: Tensor | None,
    before: int,
    window: int | None,
    scale: float,
    cap: float,
    dropout: float,
) -> Tensor:
    """The attention of queries that have `before` keys before the first one's own."""
    precision = torch.promote_types(query.dtype, torch.float32)
    scores = cap * torch.tanh((query @ key.transpose(2, 3)).to(precision) * (scale / cap))
    back = torch.arange(query.shape[2], device=query.device)[:, None] + before
    back = back - torch.arange(key.shape[2], device=query.device)
    unseen = back < 0 if window is None else (back < 0) | (back >= window)
    scores = scores.masked_fill(unseen, float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.to(precision)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    probs = scores.softmax(-1)[..., : key.shape[2]]
    return nn.functional.dropout(probs, dropout).to(value.dtype) @ value
