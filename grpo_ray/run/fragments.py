"""Parameter fragments on disk, which any layout of ranks can read whatever layout wrote them.

Every rank writes the elements that it holds, [start, start + numel) of each flattened parameter, under the parameter's name;
a rank of another layout reads the elements that it will hold from whichever files have them. No rank ever holds all of it.
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
    """The name of the parameter."""
    start: int
    values: dict[str, Tensor]
    """The values kept of each element, e.g. `master`, `exp_avg`: [numel] each."""

    @property
    def numel(self) -> int:
        return next(iter(self.values.values())).numel()


Extents = Mapping[str, Sequence[int]]
"""The (start, numel) of a parameter's elements in one file, by parameter name."""


def even_part(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """The (start, numel) of a rank's share of what all ranks hold."""
    start, end = numel * rank // num_ranks, numel * (rank + 1) // num_ranks
    return start, end - start


def write_fragments(fragments: Sequence[Fragment], path: Path) -> dict[str, tuple[int, int]]:
    """Write one safetensors file with `KIND/NAME` for each fragment. Returns the extents in it."""
    save_file({f"{kind}/{f.name}": t for f in fragments for kind, t in f.values.items()}, path)
    return {f.name: (f.start, f.numel) for f in fragments}


@dataclass
class FragmentReader:
    """Reader of any range of any parameter from the files of all ranks, which opens only the files that it needs."""

    extents: Sequence[Extents]
    """The extents in each file."""
    path_of: Callable[[int], Path]
    """The path of each file by its number."""
    _open: dict[int, Any] = field(default_factory=dict)

    def numel(self, name: str) -> int:
        """The number of elements of the whole parameter; 0 if there is none of that name."""
        return max((sum(e[name]) for e in self.extents if name in e), default=0)

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """Read [numel] elements, from `start` on.

        Raises:
            CheckpointError: a part of the range is in no file.
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
