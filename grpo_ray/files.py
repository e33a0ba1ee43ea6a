"""Files that are there whole or not at all, whenever their writer is killed."""

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
"""Behind the name of a file that is being written. One that is left over is worth nothing."""


def aside_of(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f"{path.name}{ASIDE}")


@contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of what is there when all is written; what can't be written leaves no trace.

    Args:
        durable: it is on disk, too, at the end. Without it, a machine that loses its power may leave an empty file.
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
    """In place of what is there. On disk, too, when this returns."""
    with written_aside(path) as file:
        file.write(data)


def link_whole(link: Path, target: str) -> None:
    """A symbolic link in place of what is there, which is never missing meanwhile."""
    aside = aside_of(link)
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)


MAX_JSON_BYTES = 64 << 20
"""Of a file that says what others hold."""


def check_inside(name: object) -> str:
    """A name of a file inside a folder, with `/`. Raises ValueError for one that leads out of it, or is none."""
    if not isinstance(name, str) or not name or len(name) > 1024:
        raise ValueError(f"names a file {str(name)[:40]!r}, expected a relative path")
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "/".join(parts) != name or not name.isprintable() or "\\" in name:
        raise ValueError(f"names a file {name[:80]!r}, which is not one inside of its folder")
    return name


def open_inside(folder: Path, name: str) -> BinaryIO:
    """A regular file of a folder, to be read.

    Raises:
        OSError: it is not there, leads out of the folder by a link, is no regular file, or claims to be larger than its disk.
    """
    real = os.path.realpath(folder / name)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise OSError(f"it leads out of {folder}")
    return open_regular(Path(real))


def open_regular(path: Path) -> BinaryIO:
    """Likewise, wherever links lead; neither a pipe that nobody writes to nor a device is waited for."""
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
    """Raises OSError as `open_regular`, and ValueError as `parse_json`."""
    with open_regular(path) as file:
        return parse_json(file.read(MAX_JSON_BYTES + 1))


def parse_json(data: bytes) -> Any:
    """Raises ValueError for what is no JSON, larger than MAX_JSON_BYTES or too deep."""
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"has more than {MAX_JSON_BYTES >> 20} MiB")
    return json_text.read(data)


def sync_folder(folder: Path) -> None:
    """Which names are in it, on the disk to stay."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def readable_as_asked(folder: Path) -> None:
    """Files below `folder` get the mode that the umask asks for. safetensors makes its own 0600 whatever that says, and a model
    that none but its owner may read is not exported."""
    mode = 0o666 & ~_umask()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def _umask() -> int:
    """Of this process. Asking `os.umask` changes it for a moment, under the feet of other threads."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("Umask:")[2].split()[0], 8)
