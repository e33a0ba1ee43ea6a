"""What no limit of a process bounds, measured from outside: memory of all processes together, files, locks.

Memory is the proportional set size of every process, with what of it is swapped out, and for each pipe and socket, whose buffers no
process is charged for, as much as it can hold.
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
"""The process that is ours. Where it can't be measured, nothing can."""
PIPE_BYTES = 16 * 4096
"""The kernel's default, which the filter lets nobody change."""


class UnmeasuredError(RewardError):
    """What a sandbox holds can't be read, so it was ended."""


class GoneError(Exception):
    """The sandbox is ending by itself."""


class _HiddenError(Exception):
    """A process of the program's has taken itself out of our sight: by a program that only root may read."""


def excess(root: str, memory_mb: int) -> str:
    """What there is too much of in the sandbox whose root is here; "" if nothing is.

    Raises:
        UnmeasuredError: it can't be told.
        GoneError: there is no more sandbox.
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
    """This /proc shows those of its own namespace."""
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
    """The process, and where its first thread has ended the others, which still hold all that it held."""
    yield process
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        yield from (f"{process}/task/{thread}" for thread in os.listdir(f"{process}/task"))


def _pages(task: str) -> int:
    """Bytes; 0 of one that has ended."""
    try:
        with open(f"{task}/smaps_rollup", "rb") as f:
            return sum(int(line.split()[1]) << 10 for line in f if line.startswith((b"Pss:", b"SwapPss:")))
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _buffers(task: str) -> dict[str, int]:
    """Pipe or socket -> what it can hold."""
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
    """One without memory is at its end, or past it and not yet waited for, and root's until then."""
    try:
        with open(f"{task}/statm", "rb") as f:
            return f.read().startswith(b"0 ")
    except (FileNotFoundError, ProcessLookupError):
        return True


@lru_cache(maxsize=1)
def _socket_bytes() -> int:
    """Of one socket, which may go over its limit by one message of half of it."""
    with open("/proc/sys/net/core/wmem_default") as f:
        return int(f.read()) * 3 // 2
