"""The far end of the pipes: what every process of users' code does that is started to be killed.

It imports little: such a process may be started by the dozen.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO

HEADER = struct.Struct("<Q")
PR_SET_PDEATHSIG = 1


def open_pipes() -> tuple[BinaryIO, int]:
    """Open the pipes that the arguments of this process name: where it reads, and where it writes. It dies with its parent."""
    requests = os.fdopen(int(sys.argv[1]), "rb")
    responses = int(sys.argv[2])
    die_with_parent()

    def leave_the_pipes() -> None:
        # A child that a function forked must neither hold the pipes open nor answer in our name.
        os.close(requests.fileno())
        os.close(responses)

    os.register_at_fork(after_in_child=leave_the_pipes)
    return requests, responses


def extend_search_path(search_path: Sequence[str]) -> None:
    """Let modules be found where the parent finds them."""
    sys.path.extend(p for p in search_path if p not in sys.path)


def reply(fd: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


def read_message(requests: BinaryIO) -> bytes:
    """The next length-prefixed message. The end of the pipe is the end of the parent, and so of this process."""
    header = requests.read(HEADER.size)
    if len(header) < HEADER.size:
        os._exit(0)
    (size,) = HEADER.unpack(header)
    body = requests.read(size)
    if len(body) < size:
        os._exit(0)
    return body


def limit_memory(extra_bytes: int) -> None:
    """Cap the address space: an allocation beyond it is a MemoryError here instead of a killed neighbour."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the parent dies: a function stuck in C would never notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
