"""The peak of a command's memory counts what its processes hold at once, shared pages once."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from launch.run.tree_memory import PeakMemory, tree_bytes

MIB = 1 << 20
SIZE = 200
ALONE = f"x = bytearray({SIZE} << 20); print('held', flush=True); input()"
SHARED = f"""
import os, signal
x = bytearray({SIZE} << 20)
if (child := os.fork()) == 0:
    signal.pause()
print('held', flush=True)
input()
os.kill(child, signal.SIGKILL)
"""


@contextmanager
def holding(code: str) -> Iterator[None]:
    """A child that runs this code, and holds its memory meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield
        child.communicate("\n", timeout=60)


def test_descendants_count_and_pages_that_they_share_count_once() -> None:
    for code in (ALONE, SHARED):
        before = tree_bytes()
        with holding(code):
            held = tree_bytes() - before
        assert SIZE * MIB < held < 1.5 * SIZE * MIB


def test_the_peak_stays_when_the_memory_is_given_back() -> None:
    before = tree_bytes()
    with PeakMemory(every_s=0.01) as memory:
        with holding(ALONE):
            deadline = time.monotonic() + 60
            while memory.peak < before + SIZE * MIB and time.monotonic() < deadline:
                time.sleep(0.01)
        assert tree_bytes() < before + SIZE * MIB / 2
    assert memory.peak > before + SIZE * MIB
