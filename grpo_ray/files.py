"""Files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

import os
from pathlib import Path

ASIDE = ".new"
"""Behind the name of a file that is being written. One that is left over is worth nothing."""


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """In place of what is there. On disk, too, when this returns; what can't be written leaves no trace."""
    aside = path.with_name(f"{path.name}{ASIDE}")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
