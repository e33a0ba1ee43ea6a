"""Atomic file writes: files are complete or absent, whenever their writer is killed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from grpo_ray import json_text

ASIDE = ".new"
"""The suffix of a file that is being written. A leftover one is worthless."""


def aside_of(path: Path) -> Path:
    """The path at which a file is written before it is complete."""
    return path.with_name(f"{path.name}{ASIDE}")


@contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that replaces an existing one when it is completely written; a failed write leaves no trace.

    Args:
        durable: sync the file to disk at the end. Without it, a power cut may leave an empty file.
    """
    aside = aside_of(path)
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file, replacing an existing one. It is synced to disk on return."""
    with written_aside(path) as file:
        file.write(data)


def link_whole(link: Path, target: str) -> None:
    """Create a symbolic link, replacing an existing one without a moment in which it is missing."""
    aside = aside_of(link)
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)


MAX_JSON_BYTES = 64 << 20
"""The largest size of a JSON file that describes other files."""


def check_inside(name: object) -> str:
    """Check the name of a file inside a folder, with `/`. Raises ValueError for one that leads out of it, or is no name."""
    if not isinstance(name, str) or not name or len(name) > 1024:
        raise ValueError(f"names a file {str(name)[:40]!r}, expected a relative path")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "/".join(parts) != name or not name.isprintable() or "\\" in name:
        raise ValueError(f"names a file {name[:80]!r}, which is not one inside of its folder")
    return name


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of a folder for reading.

    Raises:
        OSError: it does not exist, leads out of the folder by a link, is no regular file, or claims to be larger than its disk.
    """
    real = os.path.realpath(folder / name)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise OSError(f"it leads out of {folder}")
    return open_regular(Path(real))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, wherever links lead; it never blocks on a pipe without a writer or on a device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > shutil.disk_usage(path.parent).total:
            raise OSError(f"it claims {status.st_size:,} bytes, more than its disk has")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError as `open_regular`, and ValueError as `parse_json`."""
    with open_regular(path) as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))


def parse_json(data: bytes) -> Any:
    """Parse JSON. Raises ValueError for text that is no JSON, larger than MAX_JSON_BYTES or too deep."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"has more than {MAX_JSON_BYTES >> 20} MiB")
    return json_text.read(data)


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_as_asked(folder: Path) -> None:
    """Give files below `folder` the mode that the umask sets. safetensors makes its own 0600 regardless, and a model that only its
    owner can read is not exported.
    """
    mode = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _umask() -> int:
    """The umask of this process. `os.umask` would change it for a moment, which other threads would see."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)
