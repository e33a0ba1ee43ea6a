"""CUDA libraries without the code of GPUs that are not there: their cubins become zeros, which compress to nothing.

Headers stay, for the driver finds the code of its GPU by them; so does PTX, which it compiles where no cubin fits.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

MAGIC = 0xBA55ED50
PTX = 1
_ENTRY = "<HHIQ"
"""Kind, version, size of the header, size of what follows it."""
_ARCHITECTURE = 0x1C
"""The offset of the number of the architecture, 90 for Hopper, in an entry's header."""


def prune(data: bytearray, sections: list[tuple[int, int]], keep: frozenset[int]) -> int:
    """Zero the cubins of other architectures in these sections (offset, size); returns the bytes that became zeros."""
    zeroed = 0
    for offset, size in sections:
        for start, length, kind, architecture in entries(data, offset, offset + size):
            if kind != PTX and architecture not in keep:
                data[start : start + length] = bytes(length)
                zeroed += length
    return zeroed


def entries(data: bytes | bytearray, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(offset, size, kind, architecture) of each piece of code in a section."""
    while position + 16 <= end:
        if struct.unpack_from("<I", data, position)[0] != MAGIC:
            position += 8
            continue
        _, header, size = struct.unpack_from("<HHQ", data, position + 4)
        entry, position = position + header, position + header + size
        while entry < position:
            kind, _, head, length = struct.unpack_from(_ENTRY, data, entry)
            (architecture,) = struct.unpack_from("<I", data, entry + _ARCHITECTURE)
            yield entry + head, length, kind, architecture
            entry += head + length


def sections_of(library: Path) -> list[tuple[int, int]]:
    """(offset, size) of the sections of a library that hold code for GPUs."""
    told = subprocess.run(
        ["readelf", "-SW", str(library)], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    fields = [line.split("]")[1].split() for line in told.splitlines() if ".nv_fatbin" in line]
    return [(int(f[3], 16), int(f[4], 16)) for f in fields]


def prune_library(library: Path, keep: frozenset[int]) -> int:
    """Strip a library and zero its cubins of other architectures, in place; returns the bytes that became zeros."""
    subprocess.run(["strip", "--strip-unneeded", str(library)], check=True, timeout=300)
    data = bytearray(library.read_bytes())
    zeroed = prune(data, sections_of(library), keep)
    library.write_bytes(data)
    return zeroed
