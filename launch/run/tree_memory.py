"""The memory of a command with all the processes that it has started."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

EVERY_S = 2.0


class PeakMemory:
    """The most memory that this process and its descendants hold at once while it is entered. Pages that several of them share
    count once, in parts."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self.peak = 0
        """Bytes."""
        self._every_s = every_s
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, tree_bytes())
            if self._left.wait(self._every_s):
                return


def tree_bytes() -> int:
    """The bytes that this process and its descendants hold now."""
    root = psutil.Process()
    return sum(map(_held, [root, *root.children(recursive=True)]))


def _held(process: psutil.Process) -> int:
    """The bytes of its pages, each divided by the number of processes that share it; 0 for one that has ended."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
