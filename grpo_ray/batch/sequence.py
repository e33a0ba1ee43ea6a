"""One micro-batch over several ranks, each with a slice of its tokens (Ulysses, 2309.14509).

    ids [N] -> slice [n] -> body, whose attention has all N tokens of a part of the heads -> hidden states [n, H]
            -> values of the slice's targets [c] -> gathered [C] on every rank -> the same loss on every rank

N tokens of a micro-batch, n of a slice, C targets of a micro-batch, c of a slice. Every rank has the whole loss, and the
gradient of its own slice only: the gradient of the loss is the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from grpo_ray.batch.pack import PackedBatch
from grpo_ray.errors import ConfigError

_ROPES_BY_LENGTH = {"dynamic", "longrope"}


class SequenceRanks(Protocol):
    """The ranks that share each micro-batch, as one of them sees them."""

    @property
    def rank(self) -> int:
        """0 .. size - 1, in the order of the slices."""
        ...

    @property
    def size(self) -> int: ...

    def split_heads(self, hf: nn.Module) -> None:
        """Let the attention of a Transformers model go over all slices. Raises ConfigError when it can't."""
        ...

    def gather(self, counts: Sequence[int], *values_c: Tensor) -> tuple[Tensor, ...]:
        """Each [c] of all slices end to end, [C]. The gradient that comes back is that of the own slice."""
        ...


class Alone:
    """One rank has the whole micro-batch."""

    rank = 0
    size = 1

    def split_heads(self, hf: nn.Module) -> None: ...

    def gather(self, counts: Sequence[int], *values_c: Tensor) -> tuple[Tensor, ...]:
        return values_c


@dataclass(frozen=True)
class Slice:
    """What one rank computes of a micro-batch."""

    input_ids: NDArray[np.int64]
    """[n], n > 0 and the same on every rank."""
    position_ids: NDArray[np.int64]
    """[n], from 0 in each sequence, which may have begun in an earlier slice."""
    lengths: list[int]
    """Of every part of the micro-batch, and of what fills the last slice up."""
    sequences: list[tuple[int, ...]]
    """The parts that each sequence is made of."""
    target_rows: NDArray[np.int64]
    """[c]: which positions of the slice predict a completion token."""
    targets: NDArray[np.int64]
    """[c], possibly none: that token."""
    counts: tuple[int, ...]
    """c of each rank."""


def slice_of(batch: PackedBatch, rank: int, size: int, multiple: int = 1) -> Slice:
    """The rank's slice of the tokens, `multiple` of them or a multiple of that. They are filled up by a sequence without targets.

    Of more than one slice the sequences must not share prompts: the targets of a slice would not be neighbours.
    """
    fill = -len(batch.input_ids) % (size * multiple)
    input_ids = np.concatenate([batch.input_ids, np.zeros(fill, np.int64)])
    position_ids = np.concatenate([batch.position_ids, np.arange(fill)])
    n = len(input_ids) // size
    own = slice(rank * n, (rank + 1) * n)
    # Without shared prompts target rows ascend: the targets of a slice are neighbours, and those of all slices in order are all.
    cuts = np.searchsorted(batch.target_rows, n * np.arange(size + 1))
    targets = slice(cuts[rank], cuts[rank + 1])
    return Slice(
        input_ids=input_ids[own],
        position_ids=position_ids[own],
        lengths=[*batch.lengths, fill] if fill else batch.lengths,
        sequences=[*batch.sequences, (len(batch.lengths),)] if fill else batch.sequences,
        target_rows=batch.target_rows[targets] - rank * n,
        targets=batch.targets[targets],
        counts=tuple(np.diff(cuts).tolist()),
    )


def check_model(hf: nn.Module, size: int) -> None:
    """Can the attention of a model go over all slices: do positions not depend on a length, and can its heads be split?

    Raises:
        ConfigError: no. A slice would then silently be computed as if nothing came before it.
    """
    model: Any = hf
    config = model.config.get_text_config()
    name, mend = type(hf).__name__, "use learner.sequence_parallel_size 1"
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (ropes, *ropes.values()) if isinstance(r, dict)}
    if kinds & _ROPES_BY_LENGTH:
        kind = (kinds & _ROPES_BY_LENGTH).pop()
        raise ConfigError(f"{name} has {kind} positions, which depend on a length that a slice does not know; {mend}")
    heads = config.num_attention_heads
    if heads % size:
        fitting = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
        raise ConfigError(
            f"{name} has {heads} attention heads, which "
            f"learner.sequence_parallel_size {size} does not divide; use one of {fitting}"
        )
