"""Shared memory outlives nobody, and is never taken for another."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.weights.memory import Address, SharedMemory, map_memory

pytestmark = pytest.mark.timeout(300)
MAKER = """
import json, time
from actors.weights.memory import SharedMemory
memory = SharedMemory(1 << 20)
memory.bytes.fill_(7)
print(json.dumps(memory.address), flush=True)
time.sleep(60)
"""


@contextmanager
def maker() -> Iterator[tuple[subprocess.Popen[str], Address]]:
    with subprocess.Popen([sys.executable, "-c", MAKER], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()


def holders(name: str) -> set[int]:
    """Processes that map this memory."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if name in Path(f"/proc/{pid}/maps").read_text():
                found.add(int(pid))
        except OSError:
            continue
    return found


def test_what_one_process_writes_another_reads_in_place() -> None:
    memory = SharedMemory(1 << 20)
    mapped = map_memory(memory.address)
    assert mapped is not None
    assert mapped.data_ptr() != memory.bytes.data_ptr()
    memory.bytes[5:9] = 77
    assert mapped[4:10].tolist() == [0, 77, 77, 77, 77, 0]


def test_nothing_is_left_of_a_maker_that_is_killed() -> None:
    before = set(os.listdir("/dev/shm"))
    with maker() as (process, address):
        mapped = map_memory(address)
        assert mapped is not None
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert map_memory(address) is None, "nobody else finds it"
        assert int(mapped.sum()) == 7 << 20, "who has it, keeps it"
        assert holders(address["name"]) == {os.getpid()}
        del mapped
        assert holders(address["name"]) == set()
        assert set(os.listdir("/dev/shm")) <= before


def test_memory_that_is_withdrawn_or_of_another_name_is_not_found() -> None:
    memory = SharedMemory(4096)
    assert map_memory({**memory.address, "name": memory.address["name"][:-1]}) is None
    assert map_memory({**memory.address, "path": f"/proc/{os.getpid()}/fd/0"}) is None
    assert map_memory({**memory.address, "path": "/proc/0/fd/3"}) is None
    memory.withdraw()
    assert map_memory(memory.address) is None


def test_memory_that_is_not_there_is_refused_when_it_is_asked_for() -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            SharedMemory(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(os.listdir("/proc/self/fd")) == open_before
