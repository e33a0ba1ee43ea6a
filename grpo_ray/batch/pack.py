"""Packing: the sequences of a micro-batch, end to end, as the tensors of one forward pass.

N tokens of one micro-batch, C sampled completion tokens of one micro-batch, T completion tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.types import Step, VersionSpan

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class PackItem:
    """One sequence to be packed into a micro-batch."""

    prompt_ids: Int[NDArray[np.integer], "N"]
    """The token ids of the prompt, at least one."""
    completion_ids: Int[NDArray[np.integer], "T"]
    """[T] token ids, at least one."""
    rollout_logprobs: Float[NDArray[np.float32], "T"]
    """[T] rollout_logps."""
    advantage: float | Float[NDArray[np.floating], "T"]
    """The advantage of all its tokens, or [T]."""
    weight: float
    """The weight of each of its tokens in the loss, including the global normalizer."""
    sample: int
    """The index of the sample in the batch."""
    current: Bool[NDArray[np.bool_], "T"] | None = None
    """[T], as in `PackedBatch`; None: all True."""
    routes: NDArray[np.integer] | None = None
    """[N + T - 1, L, k] the experts to take, as in `Sample`; None: those that the model chooses."""
    sampled: Bool[NDArray[np.bool_], "T"] | None = None
    """[T] whether a policy sampled the token, at least one of them; the others are inputs and no targets. None: all True."""

    @property
    def target_places(self) -> Int[NDArray[np.int64], "_"]:
        """The places of its targets, within 0 .. T-1."""
        return np.arange(len(self.completion_ids)) if self.sampled is None else np.flatnonzero(self.sampled)


def tokens_of_version(versions: Sequence[VersionSpan], version: int, num_tokens: int) -> Bool[NDArray[np.bool_], "T"]:
    """[T] whether each token was sampled by this version of the policy."""
    return sampled_tokens([span for span in versions if span.version == version], num_tokens)


def sampled_tokens(versions: Sequence[VersionSpan], num_tokens: int) -> Bool[NDArray[np.bool_], "T"]:
    """[T] whether each token was sampled by any version of the policy."""
    out = np.zeros(num_tokens, dtype=np.bool_)
    for span in versions:
        out[span.start : span.end] = True
    return out


def token_values(steps: Sequence[Step], num_tokens: int) -> Float[NDArray[np.float64], "T"]:
    """[T] each step's value at each of its tokens, 0 after the last step."""
    out = np.zeros(num_tokens)
    start = 0
    for step in steps:
        out[start : step.end + 1] = step.value
        start = step.end + 1
    return out


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: sequences end to end. The last target of each is never an input, and nothing after it is here.

    Neighbours with the same prompt may share it: then it is there once, before the rest of each of them. Optional padding comes
    after a sequence's own tokens, which are causal and never attend to it.
    """

    input_ids: Int[NDArray[np.int64], "N"]
    """[N] token ids."""
    position_ids: Int[NDArray[np.int64], "N"]
    """[N] positions, from 0 in each sequence."""
    lengths: list[int]
    """The length of each part of `input_ids`: a sequence with its padding, a shared prompt, or the rest of a sequence after one."""
    sequences: list[tuple[int, ...]]
    """The parts of each sequence."""
    target_rows: Int[NDArray[np.int64], "C"]
    """[C] the positions that predict a completion token that a policy sampled."""
    targets: Int[NDArray[np.int64], "C"]
    """[C] the completion tokens that a policy sampled."""
    rollout_logprobs: Float[NDArray[np.float32], "C"]
    """[C] rollout_logps."""
    advantages: Float[NDArray[np.float32], "C"]
    """[C] advantages."""
    weights: Float[NDArray[np.float32], "C"]
    """[C] loss weights, 0 in a dummy."""
    samples: Int[NDArray[np.int64], "C"]
    """[C] the index of the token's sample in the batch; -1 in a dummy."""
    segments: Int[NDArray[np.int64], "C"]
    """[C] the index of the token's sequence in the micro-batch, 0, 1, .. in order."""
    current: Bool[NDArray[np.bool_], "C"]
    """[C] whether the token was sampled by the version that the update starts with."""
    routes: NDArray[np.integer] | None = None
    """[N, L, k] the experts that each token takes, by layer, 0 in padding; None: those that the model chooses."""

    @property
    def is_dummy(self) -> bool:
        return bool(self.samples[0] < 0)

    @property
    def num_inputs(self) -> int:
        """The number of tokens that are computed, 0 for a dummy."""
        return 0 if self.is_dummy else len(self.input_ids)

    @property
    def num_tokens(self) -> int:
        """The number of tokens if each sequence were computed by itself."""
        return 0 if self.is_dummy else sum(self.lengths[part] for parts in self.sequences for part in parts)

    @property
    def tokens_of_sequences(self) -> list[Int[NDArray[np.int64], "T"]]:
        """The positions in `input_ids` of the tokens of each sequence."""
        parts = np.split(np.arange(len(self.input_ids)), np.cumsum(self.lengths)[:-1])
        return [np.concatenate([parts[part] for part in sequence]) for sequence in self.sequences]


def pack(items: Sequence[PackItem], *, padded: bool = False, share_prompts: bool = False) -> PackedBatch:
    """Pack sequences end to end.

    Without any item the result is a dummy of one token with weight 0, which keeps a rank in step with the others.

    Args:
        items: the sequences, in this order.
        padded: pad each to the length of the longest.
        share_prompts: compute the prompt of neighbours with the same one once.
    """
    if not items:
        items = [PackItem(np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.float32), 0.0, 0.0, -1)]
    places = [i.target_places for i in items]
    ends = [int(p[-1]) for p in places]
    longest = max(len(i.prompt_ids) + end for i, end in zip(items, ends, strict=True)) if padded else 0
    parts: list[NDArray[np.integer]] = []
    positions: list[NDArray[np.integer]] = []
    sequences: list[tuple[int, ...]] = []
    inputs = [(i, i.completion_ids[:end]) for i, end in zip(items, ends, strict=True)]
    for neighbours in _with_one_prompt(inputs) if share_prompts else [[pair] for pair in inputs]:
        prompt_ids = neighbours[0][0].prompt_ids
        shared = len(prompt_ids) if len(neighbours) > 1 else 0
        common = (len(parts),) if shared else ()
        if shared:
            parts.append(prompt_ids)
            positions.append(np.arange(shared))
        for i, completion_ids in neighbours:
            own = np.concatenate([i.prompt_ids[shared:], completion_ids])
            padding = np.zeros(max(longest - len(own), 0), np.int64)
            sequences.append((*common, len(parts)) if len(own) else common)
            if len(own):
                parts.append(np.concatenate([own, padding]))
                # Padding begins anew, so that no position is beyond the sequence.
                positions.append(np.concatenate([np.arange(shared, shared + len(own)), np.arange(len(padding))]))
    lengths = [len(part) for part in parts]
    rows_of_parts = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    num_targets = [len(p) for p in places]
    return PackedBatch(
        input_ids=np.concatenate(parts).astype(np.int64),
        position_ids=np.concatenate(positions),
        lengths=lengths,
        sequences=sequences,
        target_rows=np.concatenate(
            [
                np.concatenate([rows_of_parts[part] for part in sequence])[len(i.prompt_ids) - 1 + own]
                for i, sequence, own in zip(items, sequences, places, strict=True)
            ]
        ),
        targets=_of_targets([i.completion_ids for i in items], places).astype(np.int64),
        rollout_logprobs=_of_targets([i.rollout_logprobs for i in items], places).astype(np.float32),
        advantages=_of_targets(
            [np.broadcast_to(np.float32(i.advantage), len(i.completion_ids)) for i in items], places
        ),
        weights=np.repeat(np.array([i.weight for i in items], dtype=np.float32), num_targets),
        samples=np.repeat(np.array([i.sample for i in items], dtype=np.int64), num_targets),
        segments=np.repeat(np.arange(len(items), dtype=np.int64), num_targets),
        current=_of_targets(
            [np.ones(len(i.completion_ids), np.bool_) if i.current is None else i.current for i in items], places
        ),
        routes=_routes(items, [np.concatenate([rows_of_parts[part] for part in s]) for s in sequences], sum(lengths)),
    )


def _routes(
    items: Sequence[PackItem], rows_of_sequences: list[NDArray[np.int64]], num_rows: int
) -> NDArray[np.integer] | None:
    """The routes of all rows. Those of a shared prompt are those of its first sequence."""
    first = items[0].routes
    if first is None:
        return None
    out = np.zeros((num_rows, *first.shape[1:]), first.dtype)
    for item, rows in reversed(list(zip(items, rows_of_sequences, strict=True))):
        if item.routes is not None:
            out[rows[: len(item.routes)]] = item.routes
    return out


def _of_targets(values: Sequence[NDArray[Any]], places: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
    """[C] of the values [T] of each sequence those of its targets."""
    return np.concatenate([of_sequence[own] for of_sequence, own in zip(values, places, strict=True)])


_Inputs = tuple[PackItem, NDArray[np.integer]]
"""A sequence, and the completion tokens that are inputs."""


def _with_one_prompt(items: Sequence[_Inputs]) -> list[list[_Inputs]]:
    """Runs of neighbours with the same prompt."""
    runs: list[list[_Inputs]] = []
    for item in items:
        if runs and np.array_equal(runs[-1][-1][0].prompt_ids, item[0].prompt_ids):
            runs[-1].append(item)
        else:
            runs.append([item])
    return runs
