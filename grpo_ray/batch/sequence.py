"""Sequence parallelism: one micro-batch over several ranks, each with a slice of its tokens (Ulysses, 2309.14509).

    ids [N] -> slice [n] -> body, whose attention has all N tokens of a part of the heads -> hidden states [n, H]
            -> values of the slice's targets [c] -> gathered [C] on every rank -> the same loss on every rank

N tokens of a micro-batch, n of a slice, C targets of a micro-batch, c of a slice. Every rank has the whole loss, and only the
gradient of its own slice: the gradient of the loss is the sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from grpo_ray.batch.pack import PackedBatch
from grpo_ray.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ROPES_BY_LENGTH = {"dynamic", "longrope"}


class SequenceRanks(Protocol):
    """The ranks that share each micro-batch, as seen by one of them."""

    @property
    def rank(self) -> int:
        """The index of this rank, 0 .. size - 1, in the order of the slices."""
        ...

    @property
    def size(self) -> int: ...

    def split_heads(self, hf: nn.Module) -> None:
        """Make the attention of a Transformers model span all slices. Raises ConfigError when it cannot."""
        ...

    def gather(self, counts: Sequence[int], *values_c: Float[Tensor, "c"]) -> tuple[Float[Tensor, "C"], ...]:
        """Concatenate the [c] of all slices to [C]. The gradient that comes back is that of the own slice."""
        ...


class Alone:
    """A single rank with the whole micro-batch."""

    rank = 0
    size = 1

    def split_heads(self, hf: nn.Module) -> None: ...

    def gather(self, _counts: Sequence[int], *values_c: Float[Tensor, "c"]) -> tuple[Float[Tensor, "C"], ...]:
        return values_c


@dataclass(frozen=True)
class Slice:
    """The part of a micro-batch that one rank computes."""

    input_ids: Int[NDArray[np.int64], "n"]
    """[n] token ids, n > 0 and the same on every rank."""
    position_ids: Int[NDArray[np.int64], "n"]
    """[n] positions, from 0 in each sequence, which may have begun in an earlier slice."""
    lengths: list[int]
    """The length of every part of the micro-batch, and of the padding of the last slice."""
    sequences: list[tuple[int, ...]]
    """The parts of each sequence."""
    target_rows: Int[NDArray[np.int64], "c"]
    """[c] the positions of the slice that predict a completion token."""
    targets: Int[NDArray[np.int64], "c"]
    """[c] the completion tokens, possibly none."""
    counts: tuple[int, ...]
    """The c of each rank."""


def slice_of(batch: PackedBatch, rank: int, size: int, multiple: int = 1) -> Slice:
    """Cut the rank's slice of the tokens, whose length is a multiple of `multiple`; a sequence without targets pads the last slice.

    With more than one slice the sequences must not share prompts: the targets of a slice would not be neighbours.
    """
    fill = -len(batch.input_ids) % (size * multiple)
    input_ids = np.concatenate([batch.input_ids, np.zeros(fill, np.int64)])
    position_ids = np.concatenate([batch.position_ids, np.arange(fill)])
    n = len(input_ids) // size
    own = slice(rank * n, (rank + 1) * n)
    # Without shared prompts target rows ascend: the targets of a slice are neighbours, and together the slices have all targets in
    # order.
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


def positions_by_length(config: Any) -> str | None:
    """The kind of a Transformers config's positions, if they depend on the length of what is computed together; else None."""
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {r.get("rope_type") for r in (ropes, *ropes.values()) if isinstance(r, dict)}
    return next((kind for kind in sorted(_ROPES_BY_LENGTH) if kind in kinds), None)


def check_model(hf: nn.Module, size: int) -> None:
    """Check that the attention of a model can span all slices: positions do not depend on a length, and its heads can be split.

    Raises:
        ConfigError: it cannot; a slice would silently be computed as if nothing came before it.
    """
    model: Any = hf
    config = model.config.get_text_config()
    name, mend = type(hf).__name__, "use learner.sequence_parallel_size 1"
    if kind := positions_by_length(config):
        raise ConfigError(f"{name} has {kind} positions, which depend on a length that a slice does not know; {mend}")
    heads = config.num_attention_heads
    if heads % size:
        fitting = ", ".join(str(k) for k in range(1, heads + 1) if heads % k == 0)
        raise ConfigError(
            f"{name} has {heads} attention heads, which "
            f"learner.sequence_parallel_size {size} does not divide; use one of {fitting}"
        )
