"""The plain path: a model's own forward over one sequence a row, padded on the right, with its own attention and masks.

It is for models that pack wrongly: layers other than attention move information between their tokens, or their attention has masks
or terms of its own. No prompt is shared. What is padded comes after the tokens of its row, which are causal and never see it.

Suffixes: S sequences of a micro-batch, L tokens of the longest, C completion tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from grpo_ray.batch.device import on_device
from grpo_ray.batch.pack import PackedBatch
from grpo_ray.models.linear import multiple_of_tokens


def rows_of(batch: PackedBatch, device: torch.device) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The token ids [S, L] of the sequences of a micro-batch, however it is packed, and the places [C] in S * L of the tokens that
    predict a completion token."""
    sequences, longest = batch.tokens_of_sequences, row_length(batch, device)
    ids_SL = np.zeros((len(sequences), longest), np.int64)
    for row, tokens in zip(ids_SL, sequences, strict=True):
        row[: len(tokens)] = batch.input_ids[tokens]
    return ids_SL, batch.segments * longest + batch.position_ids[batch.target_rows]


def row_length(batch: PackedBatch, device: torch.device) -> int:
    """L, the length of the rows of a micro-batch."""
    longest, num = max(map(len, batch.tokens_of_sequences)), len(batch.sequences)
    multiple = multiple_of_tokens(num * longest, device)
    return longest + -longest % (multiple // math.gcd(multiple, num))


def plain_states(body: Any, batch: PackedBatch, device: torch.device) -> Tensor:
    """The hidden states [C, H] of a Transformers model without its head, at the tokens that predict a completion token."""
    ids_SL, places_C = rows_of(batch, device)
    hidden_SLH: Tensor = body(input_ids=on_device(ids_SL, device), use_cache=False).last_hidden_state
    return hidden_SLH.flatten(0, 1)[on_device(places_C, device)]


def head_inputs(hf: Any, batch: PackedBatch, device: torch.device) -> Tensor:
    """What a language model's own forward hands to its head [C, H], at the tokens that predict a completion token."""
    ids_SL, places_C = rows_of(batch, device)
    with _watched(hf.get_output_embeddings()) as seen:
        hf(input_ids=on_device(ids_SL, device), use_cache=False)
    if len(seen) != 1:
        raise ValueError(f"{type(hf).__name__} calls its output layer {len(seen)} times in a forward pass, not once")
    return seen[0].flatten(0, 1)[on_device(places_C, device)]


@contextmanager
def _watched(head: nn.Module) -> Iterator[list[Tensor]]:
    """The inputs of the head inside, which computes the logits of each row's last token alone: nobody needs them."""
    seen: list[Tensor] = []

    def last_token(_head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return args[0][:, -1:], *args[1:]

    handle = head.register_forward_pre_hook(last_token)
    try:
        yield seen
    finally:
        handle.remove()


def use_own_attention(hf: Any) -> None:
    """Let a Transformers model attend as it does where nobody asks for an implementation."""
    hf.set_attn_implementation(hf.get_correct_attn_implementation(None))


@contextmanager
def own_attention(hf: Any) -> Iterator[None]:
    """A context in which a Transformers model attends as it does where nobody asks for an implementation."""
    chosen = hf.config._attn_implementation
    use_own_attention(hf)
    try:
        yield
    finally:
        hf.set_attn_implementation(chosen)
