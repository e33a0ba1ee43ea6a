"""A scoring process with all that it started: found by parentage, and by a mark in the environment, and ended together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable

import psutil

TAG = "GRPO_RAY_SCORER"
"""The environment variable that marks a scoring process and all that it starts."""


def end_family(process: subprocess.Popen[bytes], tag: str) -> None:
    """End a process, its process group, and every descendant, also those in sessions of their own."""
    if process.poll() is None:
        # Stopped first: a process that can't run can't fork between the search and the kill.
        _signal([process.pid], signal.SIGSTOP)
    for _ in range(5):
        found = _family(process.pid, tag)
        if not found:
            break
        _signal(found, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)


def _family(pid: int, tag: str) -> list[int]:
    """The living processes that descend from `pid`: by parentage, and by a mark in the environment, which a process
    keeps when its parents are gone and it leads a session of its own."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == tag:
                found.add(process.pid)
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        family = [parent, *parent.children(recursive=True)]
        found |= {p.pid for p in family if p.status() != psutil.STATUS_ZOMBIE}
    return sorted(found)


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
