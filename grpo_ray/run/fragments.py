"""Parts of parameters on disk, so that any layout reads what any other has written.

Every rank writes the elements that it holds, [start, start + numel) of each flattened parameter, under the parameter's name;
a rank of another layout reads the elements that it will hold from whichever files have them. Nobody ever holds the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grpo_ray.errors import CheckpointError


@dataclass(frozen=True)
class Fragment:
    name: str
    """Of the parameter."""
    start: int
    values: dict[str, Tensor]
    """What is kept of each element, e.g. `master`, `exp_avg`: [numel] each."""

    @property
    def numel(self) -> int:
        return next(iter(self.values.values())).numel()


Extents = Mapping[str, Sequence[int]]
"""Name -> (start, numel) of what one file holds of a parameter."""


def even_part(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """(start, numel) of a rank's share of what all ranks hold."""
    start, end = numel * rank // num_ranks, numel * (rank + 1) // num_ranks
    return start, end - start


def write_fragments(fragments: Sequence[Fragment], path: Path) -> dict[str, tuple[int, int]]:
    """One safetensors file with `KIND/NAME` for each. Returns what it holds."""
    save_file({f"{kind}/{f.name}": t for f in fragments for kind, t in f.values.items()}, path)
    return {f.name: (f.start, f.numel) for f in fragments}


@dataclass
class FragmentReader:
    """Reads any stretch of any parameter out of the files of all ranks, and opens only those that have some of it."""

    extents: Sequence[Extents]
    """Of each file."""
    path_of: Callable[[int], Path]
    """Number of a file -> where it lies."""
    _open: dict[int, Any] = field(default_factory=dict)

    def numel(self, name: str) -> int:
        """Elements of the whole parameter; 0 if there is none of that name."""
        return max((sum(e[name]) for e in self.extents if name in e), default=0)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """[numel], from `start` on.

        Raises:
            CheckpointError: some of it is in no file.
        """
        end, parts, at = start + numel, [], start
        having = sorted((e[name][0], i) for i, e in enumerate(self.extents) if name in e)
        for begin, number in having:
            stop = begin + self.extents[number][name][1]
            if begin <= at < stop and at < end:
                parts.append(self._stretch(number, f"{kind}/{name}", at - begin, min(stop, end) - begin))
                at = min(stop, end)
        if at < end:
            raise CheckpointError(
                f"elements {at} to {end} of {kind} of {name} are in none of {len(self.extents)} files"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def _stretch(self, number: int, key: str, begin: int, end: int) -> Tensor:
        path = self.path_of(number)
        try:
            if number not in self._open:
                self._open[number] = safe_open(path, "pt")
            stretch: Tensor = self._open[number].get_slice(key)[begin:end]
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{path} can't be read ({e})") from None
        return stretch
