"""Attention over packed sequences that cannot see each other.

A packed micro-batch is one row [1, N] of sequences end to end. Neighbours of equal length are attended as one batch, so
sort by length before packing. Transformers' own masks are avoided: with its default cache, or a boolean mask under
eager attention, packed sequences silently see each other.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "grpo_ray_packed"
"""Name of the exact per-segment attention in Transformers' registry."""
FLASH = "flash_attention_2"
_LAYERS = {"full_attention", "sliding_attention"}
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def choose_attention(wanted: str, device: torch.device) -> str:
    """`model.attention` -> `attn_implementation` of Transformers. Registers ours when it is the answer.

    Raises:
        ValueError: flash-attention is asked for, and there is no GPU or no package.
    """
    flash = device.type == "cuda" and importlib.util.find_spec("flash_attn") is not None
    if wanted == FLASH and not flash:
        raise ValueError(f"model.attention is {FLASH}, which needs a GPU and the flash-attn package; use auto")
    if wanted in (FLASH, "auto") and flash:
        return FLASH
    _register()
    return PACKED


def check_packable(hf: nn.Module) -> None:
    """Does nothing but attention carry anything from one token of a Transformers model to another?

    Raises:
        ValueError: no. Packed sequences, or slices of one, would silently be computed as if they were something else.
    """
    model: Any = hf
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYERS)
    if odd or model._is_stateful or not model._supports_attention_backend:
        what = f"layers of {', '.join(odd)}" if odd else "layers that do not use Transformers' attention interface"
        raise ValueError(
            f"{type(hf).__name__} has {what}, over which packed sequences would see each other: not supported"
        )


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


def attention_kwargs(lengths: list[int], implementation: str, device: torch.device) -> dict[str, Any]:
    """What the model's forward must be given besides ids and positions for sequences of these lengths, in this
    order.
    """
    if implementation == PACKED:
        return {"packed_runs": [(len(list(run)), length) for length, run in groupby(lengths)]}
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_runs: list[tuple[int, int]] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment; the signature is that of Transformers' attention functions.

    Args:
        query: [1, heads, N, D].
        key: [1, key heads, N, D].
        value: [1, key heads, N, D].
        packed_runs: (number, length) of the segments, end to end; equal neighbours together.

    Returns:
        [1, N, heads, D], and no weights.

    Raises:
        ValueError: the model did not hand the runs on, or its attention has a feature that this one lacks.
    """
    odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if packed_runs is None or odd:
        what = f"uses {', '.join(odd)}" if odd else "does not hand keyword arguments on to its attention"
        raise ValueError(
            f"{type(module).__name__} {what}: not supported with model.attention sdpa; use flash_attention_2 on a GPU"
        )
    dtype = query.dtype
    if _upcast(query):
        query, key, value = query.float(), key.float(), value.float()
    heads = query.shape[1]
    sizes = [number * length for number, length in packed_runs]
    out = []
    # One split per tensor, not one slice per segment: the backward of a slice fills a gradient of the whole length.
    parts = zip(*(x[0].transpose(0, 1).split(sizes) for x in (query, key, value)), strict=True)
    for (number, length), qkv in zip(packed_runs, parts, strict=True):
        q, k, v = (x.reshape(number, length, *x.shape[1:]).transpose(1, 2) for x in qkv)
        windowed = sliding_window is not None and length > sliding_window
        segment = nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_window_mask(length, sliding_window, q.device) if windowed and sliding_window else None,
            dropout_p=dropout,
            is_causal=not windowed,
            scale=scaling,
            enable_gqa=heads != k.shape[1],
        )
        out.append(segment.transpose(1, 2).reshape(number * length, heads, -1))
    return torch.cat(out).to(dtype).unsqueeze(0), None


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length], True where a query may look: itself and the window - 1 tokens before it."""
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _upcast(query: Tensor) -> bool:
    """CPUs without bf16 instructions emulate them: torch's kernel is 4 to 7 times slower there than in fp32."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and not cpu_has_bf16()


@cache
def cpu_has_bf16() -> bool:
    """Does this CPU multiply bfloat16 by itself?"""
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())
