"""Files that are there whole or not at all, whenever their writer is killed."""

from __future__ import annotations

import os
from pathlib import Path

ASIDE = ".new"
"""Behind the name of a file that is being written. One that is left over is worth nothing."""


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """In place of what is there. On disk, too, when this returns."""
    aside = path.with_name(f"{path.name}{ASIDE}")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
