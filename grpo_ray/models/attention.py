"""Attention over packed sequences that cannot see each other.

A packed micro-batch is one row [1, N] of parts end to end: whole sequences, or prompts and their continuations. Only attention
moves information between tokens, so only here a prompt that several sequences share is repeated for each of them; all other
operations of a layer compute it once. Sequences of equal length are attended as one batch. Transformers' own masks are
avoided: with its default cache, or a boolean mask under eager attention, packed sequences silently see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from grpo_ray.models.features.attention_scores import attend
from grpo_ray.models.varlen import VarlenLayout, has_kernel, varlen_attention

PACKED = "grpo_ray_packed"
"""The name of the exact per-segment attention in Transformers' registry."""
FLASH = "flash_attention_2"
_LAYERS = {"full_attention", "sliding_attention"}
_UNSUPPORTED = ("position_bias", "indices", "block_indices")


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """The `attn_implementation` of Transformers for `model.attention`. Registers ours if it is the answer.

    Args:
        dtype: what the model computes in.

    Raises:
        ValueError: flash-attention is requested, and there is no GPU or no package, or it does not compute in this dtype.
    """
    from transformers.utils import is_flash_attn_2_available

    # flash-attn 4 installs a package of the same name, of which Transformers' flash_attention_2 is no part.
    flash = device.type == "cuda" and is_flash_attn_2_available()
    if wanted == FLASH and not flash:
        raise ValueError(
            f"model.attention is {FLASH}, which needs a GPU and the flash-attn package, version 2; use auto"
        )
    half = dtype != torch.float32
    if wanted == FLASH and not half:
        raise ValueError(f"model.attention is {FLASH}, which has no float32; use auto, or model.dtype bfloat16")
    if wanted in (FLASH, "auto") and flash and half:
        return FLASH
    _register()
    return PACKED


def use_attention_without_plans() -> None:
    """Let torch take its flash kernels instead of cuDNN's in this process: cuDNN makes an execution plan for each new shape, which
    takes 25 ms and more of the host, and keeps them all. No two micro-batches have the same lengths."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def why_unpackable(hf: nn.Module) -> str | None:
    """Why packed sequences, or slices of one, would silently see each other in a Transformers model: more than attention moves
    information between its tokens. None: nothing is known to."""
    model: Any = hf
    odd = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _LAYERS)
    if not odd and not model._is_stateful and model._supports_attention_backend:
        return None
    what = f"layers of {', '.join(odd)}" if odd else "layers that do not use Transformers' attention interface"
    return f"{type(hf).__name__} has {what}, over which packed sequences would see each other"


def check_causal(hf: nn.Module) -> None:
    """Raises ValueError for a model that is known to attend to what comes after a token."""
    causal = [layer.is_causal for layer in hf.modules() if isinstance(getattr(layer, "is_causal", None), bool)]
    if causal and not any(causal):
        raise ValueError(
            f"{type(hf).__name__} attends to what comes after a token, too: only causal models are trained"
        )


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    use_attention_without_plans()
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, lambda *_, **__: None)


@dataclass(frozen=True)
class Run:
    """A run of sequences of equal length."""

    number: int
    length: int
    parts: tuple[int, ...]
    """The indices of the parts that, end to end, are the sequences of the run."""


@dataclass(frozen=True)
class PackedLayout:
    """Which tokens of a packed row form a sequence."""

    sizes: list[int]
    """The number of tokens of each part of the row, end to end."""
    runs: list[Run]
    """The runs; every part is in at least one."""
    varlen: VarlenLayout | None = None
    """The same for a GPU's kernel, on that GPU."""

    @classmethod
    def of(cls, lengths: Sequence[int], sequences: Sequence[tuple[int, ...]]) -> PackedLayout:
        """The layout of parts of these lengths, given which of them each sequence consists of.

        Neighbouring whole sequences of equal length become one part, which takes no copy.
        """
        if all(len(parts) == 1 for parts in sequences):
            equal = [(len(list(run)), length) for length, run in groupby(lengths)]
            return cls(
                [n * length for n, length in equal], [Run(n, length, (k,)) for k, (n, length) in enumerate(equal)]
            )

        def length_of(parts: tuple[int, ...]) -> int:
            return sum(lengths[part] for part in parts)

        runs = groupby(sorted(dict.fromkeys(sequences), key=length_of), key=length_of)
        members = [(length, list(run)) for length, run in runs]
        return cls(
            list(lengths), [Run(len(run), length, tuple(part for s in run for part in s)) for length, run in members]
        )


def attention_kwargs(
    lengths: list[int], sequences: list[tuple[int, ...]], implementation: str, device: torch.device
) -> dict[str, Any]:
    """The arguments of the model's forward besides ids and positions: see `PackedLayout.of`.

    Raises:
        ValueError: sequences share parts, which only the packed attention supports.
    """
    if implementation == PACKED:
        layout = PackedLayout.of(lengths, sequences)
        if device.type == "cuda":
            layout = replace(layout, varlen=VarlenLayout.of(lengths, sequences, device))
        return {"packed_layout": layout}
    if len(sequences) != len(lengths) or any(len(parts) > 1 for parts in sequences):
        raise ValueError(
            f"{implementation} can't compute sequences that share a prompt; set learner.share_prompts to false"
        )
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
    packed_layout: PackedLayout | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence; the signature is that of Transformers' attention functions.

    Args:
        query: [1, heads, N, D].
        key: [1, key heads, N, D].
        value: [1, key heads, N, D].
        packed_layout: the layout of sequences in the N tokens.
        s_aux: [heads], the sinks.
        softcap: the cap of the scores.

    Returns:
        [1, N, heads, D], and no weights.

    Raises:
        ValueError: the model did not pass the layout on, or its attention has a feature that this one lacks.
    """
    odd = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if packed_layout is None or odd:
        what = f"uses {', '.join(odd)}" if odd else "does not hand keyword arguments on to its attention"
        raise ValueError(
            f"{type(module).__name__} {what}: not supported with model.attention sdpa; use flash_attention_2 on a GPU"
        )
    plain = s_aux is None and softcap is None
    if packed_layout.varlen is not None and plain and has_kernel(query, dropout):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return varlen_attention(q, k, v, packed_layout.varlen, scaling, sliding_window).unsqueeze(0), None
    dtype = query.dtype
    if _upcast(query):
        query, key, value = query.float(), key.float(), value.float()
    heads = query.shape[1]
    sizes = packed_layout.sizes
    # One split per tensor rather than one slice per part: the backward of a slice fills a gradient of the whole length.
    parts = [x[0].transpose(0, 1).split(sizes) for x in (query, key, value)]
    out: dict[int, Tensor] = {}
    for run in packed_layout.runs:
        q, k, v = (
            _joined([x[part] for part in run.parts]).unflatten(0, (run.number, run.length)).transpose(1, 2)
            for x in parts
        )
        attended = attend(q, k, v, window=sliding_window, scale=scaling, dropout=dropout, sinks_H=s_aux, cap=softcap)
        rows = attended.transpose(1, 2).reshape(run.number * run.length, heads, -1)
        for part, of_part in zip(run.parts, rows.split([sizes[part] for part in run.parts]), strict=True):
            # A shared prompt's output is the same from every sequence that has it.
            out.setdefault(part, of_part)
    return torch.cat([out[part] for part in range(len(sizes))]).to(dtype).unsqueeze(0), None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _upcast(query: Tensor) -> bool:
    """Whether to compute in fp32: CPUs without bf16 instructions emulate them, and torch's bf16 kernel is 4 to 7 times slower
    there."""
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and not cpu_has_bf16()


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions to multiply bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported())
