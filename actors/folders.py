"""The folder for temporary files: one that is writable, with a path short enough for the sockets in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOCKET_PATH = 107
"""Linux's limit for the path of a socket, in bytes."""
RAYS_PART = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store") + 2
"""The length that Ray appends to its temporary folder for the longest of its sockets."""
VLLMS_PART = len("/grpo-ray-01234567-4194304-abcdefgh") + 37
"""The length of our folder of an engine, and of the name of a socket of vLLM in it."""
LONGEST_FOLDER = SOCKET_PATH - max(RAYS_PART, VLLMS_PART)
MIN_FREE = 64 << 20
"""The bytes that Ray's logs and sockets need; Ray itself refuses to spill to a disk that is 95% full."""
SHORT_ONES = ("/tmp", "/var/tmp", "/dev/shm")
PREFIX = "grpo-ray-"


def unusable(folder: str) -> str | None:
    """Why no file can be created in the folder; None: one can."""
    path = Path(folder)
    if not path.is_absolute():
        return "is no absolute path"
    try:
        if not path.exists():
            return "does not exist"
        if not path.is_dir():
            return "is no folder"
        # Permissions say nothing about root, nor about a file system that is read-only.
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
        if shutil.disk_usage(path).free < MIN_FREE:
            return f"has less than {MIN_FREE >> 20} MiB free"
    except (OSError, ValueError) as e:
        return f"can't be written to ({getattr(e, 'strerror', None) or e})"
    return None


def unmakeable(folder: str) -> str | None:
    """As `unusable`, for a folder that may not exist yet: then its nearest existing parent counts."""
    path = Path(folder).expanduser().absolute()
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return unusable(str(path))


def too_long(folder: str) -> bool:
    """Whether the path of a socket in the folder would be longer than Linux allows."""
    return len(os.fsencode(folder)) > LONGEST_FOLDER


def candidates() -> Iterator[str]:
    """Short folders, the best first."""
    yield from SHORT_ONES
    if (of_session := os.environ.get("XDG_RUNTIME_DIR")) is not None:
        yield of_session


def make_short() -> Path | None:
    """A new folder with a short path, for this user alone, with an unpredictable name; None: there is no place for it."""
    for place in candidates():
        if unusable(place) is None and not too_long(f"{place}/{PREFIX}01234567"):
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    return None
