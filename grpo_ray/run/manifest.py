"""Manifest of a checkpoint: `manifest.json`, written last, with the size and SHA-256 of every other file.

`sha256sum` computes the same sums.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from grpo_ray.files import check_inside, parse_json

NAME = "manifest.json"
FORMAT = 1
MAX_FILE_BYTES = 1 << 50
_SHA256 = re.compile("[0-9a-f]{64}")
THREADS = 4
"""The number of threads; hashing and reading release the interpreter lock."""


@dataclass(frozen=True)
class FileSum:
    size: int
    sha256: str


Sums = Mapping[str, FileSum]
"""Path inside the checkpoint, with `/` -> its size and checksum."""


def sum_of(file: BinaryIO) -> FileSum:
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    return FileSum(file.tell(), digest.hexdigest())


def sums_below(folder: Path, prefix: str) -> dict[str, FileSum]:
    """The sums of every file below a folder, each under `prefix/`."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            out[f"{prefix}/{path.relative_to(folder).as_posix()}"] = sum_of(file)
    return out


def to_json(step: int, sums: Sums) -> bytes:
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    return json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1).encode()


def from_json(data: bytes, step: int) -> Sums:
    """Parse a manifest. Raises ValueError if `to_json` did not write it for that step, or a path leads out of the checkpoint."""
    content = parse_json(data)
    try:
        if not _is_number(content["format"], FORMAT):
            raise ValueError(f"is of format {str(content['format'])[:40]}, this is grpo-ray's format {FORMAT}")
        if not _is_number(content["step"], step):
            raise ValueError(f"is of step {str(content['step'])[:40]}")
        sums = {check_inside(name): _checked(FileSum(**entry)) for name, entry in content["files"].items()}
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"is not what was written ({type(e).__name__}: {e})") from None
    if not sums:
        raise ValueError("names no files")
    return sums


def _is_number(value: object, wanted: int) -> bool:
    """Whether the value is this integer, and neither 1.0 nor true for 1."""
    return type(value) is int and value == wanted


def _checked(entry: FileSum) -> FileSum:
    if type(entry.size) is not int or not 0 <= entry.size <= MAX_FILE_BYTES:
        raise ValueError(f"gives a file a size of {str(entry.size)[:40]!r}")
    if not isinstance(entry.sha256, str) or _SHA256.fullmatch(entry.sha256) is None:
        raise ValueError(f"gives a file a SHA-256 of {str(entry.sha256)[:80]!r}")
    return entry


def first_wrong_size(sums: Sums, size_now: Callable[[str], int]) -> str | None:
    """The same as `first_wrong` by sizes alone, without reading file contents."""
    for name, want in sums.items():
        try:
            size = size_now(name)
        except OSError as e:
            return f"{name} can't be read ({e})"
        if size != want.size:
            return f"{name} has {size} bytes instead of {want.size}"
    return None


def first_wrong(sums: Sums, sum_now: Callable[[str], FileSum]) -> str | None:
    """The first file that fails its checksum, and how; None if all pass.

    Args:
        sums: the sums when it was written.
        sum_now: path inside the checkpoint -> its sum now; an OSError means that it is missing, other exceptions are passed on.
    """
    pool = ThreadPoolExecutor(THREADS)
    try:
        found: Iterable[str | None] = pool.map(lambda name: _wrong(name, sums[name], sum_now), sums)
        return next((wrong for wrong in found if wrong), None)
    finally:
        # After the first decisive answer nobody waits for those of hundreds of other files.
        pool.shutdown(cancel_futures=True)


def _wrong(name: str, want: FileSum, sum_now: Callable[[str], FileSum]) -> str | None:
    try:
        got = sum_now(name)
    except OSError as e:
        return f"{name} can't be read ({e})"
    if got.size != want.size:
        return f"{name} has {got.size} bytes instead of {want.size}"
    if got.sha256 != want.sha256:
        return (
            f"{name} is damaged: its SHA-256 is {got.sha256[:12]}.., and was {want.sha256[:12]}.. when it was written"
        )
    return None


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of the names and sums of every file below a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return sum_of(file).sha256
    sums = sums_below(path, ".")
    lines = "".join(f"{sums[name].sha256}  {name}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()
