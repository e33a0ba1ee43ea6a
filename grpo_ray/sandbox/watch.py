"""Measures from outside for what no limit of a process bounds: memory of all processes together, files, locks.

Memory is the proportional set size of every process, including swapped-out pages, and for each pipe and socket, whose buffers no
process is charged for, its capacity.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import lru_cache

from grpo_ray.errors import RewardError

MAX_FILES = 4096
MAX_LOCKS = 4096
FIRST = "1"
"""The sandbox's process that is ours. If it can't be measured, nothing can."""
PIPE_BYTES = 16 * 4096
"""The kernel's default size, which the filter lets nobody change."""


class UnmeasuredError(RewardError):
    """The contents of a sandbox can't be measured, so it was ended."""


class GoneError(Exception):
    """The sandbox is ending by itself."""


class _HiddenError(Exception):
    """A process of the program has hidden itself from us, by executing a program that only root may read."""


def excess(root: str, memory_mb: int) -> str:
    """The kind of excess in the sandbox with this root; "" if there is none.

    Raises:
        UnmeasuredError: it can't be measured.
        GoneError: the sandbox has ended.
    """
    try:
        disks = [os.statvfs(f"{root}{folder}") for folder in ("/tmp", "/dev/shm")]
        if sum(disk.f_files - disk.f_ffree for disk in disks) > MAX_FILES:
            return f"it made more than {MAX_FILES} files"
        if _locks(root) > MAX_LOCKS:
            return f"it holds more than {MAX_LOCKS} locks"
        if _memory_bytes(f"{root}/proc") > memory_mb << 20:
            return f"its processes took more than {memory_mb} MiB together"
    except _HiddenError:
        return "one of its processes can't be measured"
    except (FileNotFoundError, ProcessLookupError):
        raise GoneError from None
    except OSError as e:
        raise UnmeasuredError(
            f"what a sandbox holds can't be measured, so nothing runs in it ({e.filename or root}: {e.strerror}); under root that "
            "takes CAP_SYS_PTRACE (Docker: --cap-add SYS_PTRACE): grant it, or run as another user"
        ) from None
    return ""


def _locks(root: str) -> int:
    """The number of locks. This /proc shows those of its own namespace."""
    with open(f"{root}/proc/locks", "rb") as f:
        return f.read().count(b"\n")


def _memory_bytes(proc: str) -> int:
    total, buffers = 0, dict[str, int]()
    for pid in sorted(filter(str.isdigit, os.listdir(proc)), key=int):
        try:
            for task in _tasks(f"{proc}/{pid}"):
                pages = _pages(task)
                total += pages
                buffers.update(_buffers(task))
                if pages:
                    break
        except PermissionError:
            if pid == FIRST:
                raise
            raise _HiddenError from None
    return total + sum(buffers.values())


def _tasks(process: str) -> Iterator[str]:
    """The process, or, if its first thread has ended, the others, which still hold all that it held."""
    yield process
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        yield from (f"{process}/task/{thread}" for thread in os.listdir(f"{process}/task"))


def _pages(task: str) -> int:
    """The bytes of a process; 0 if it has ended."""
    try:
        with open(f"{task}/smaps_rollup", "rb") as f:
            return sum(int(line.split()[1]) << 10 for line in f if line.startswith((b"Pss:", b"SwapPss:")))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _buffers(task: str) -> dict[str, int]:
    """Pipe or socket -> its capacity in bytes."""
    found = {}
    try:
        for fd in os.listdir(f"{task}/fd"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                at = os.readlink(f"{task}/fd/{fd}")
                if at.startswith("pipe:"):
                    found[at] = PIPE_BYTES
                elif at.startswith("socket:"):
                    found[at] = _socket_bytes()
    except (FileNotFoundError, ProcessLookupError):
        pass
    except PermissionError:
        if not _has_ended(task):
            raise
    return found


def _has_ended(task: str) -> bool:
    """Whether a process has ended: without memory it is ending, or has not been waited for yet, and belongs to root until then."""
    try:
        with open(f"{task}/statm", "rb") as f:
            return f.read().startswith(b"0 ")
    except (FileNotFoundError, ProcessLookupError):
        return True


@lru_cache(maxsize=1)
def _socket_bytes() -> int:
    """The capacity of one socket, which may exceed its limit by one message of half of it."""
    with open("/proc/sys/net/core/wmem_default") as f:
        return int(f.read()) * 3 // 2
