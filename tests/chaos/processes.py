"""Who lives below this process, orphans included: what a run started can't leave the tree, however its parents died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Collection

import psutil

from tests.end_to_end.runs import started

PR_SET_CHILD_SUBREAPER = 36
RAYS_OWN = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""They end with their raylet when process 1 becomes their parent; adopted by another, a minute later."""


def adopt_orphans() -> None:
    """From now on descendants of this process whose parents die become its children, not those of process 1."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


def title(process: psutil.Process) -> str:
    """Its command line, where Ray and vLLM write what their processes are. Empty for one that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def family(pid: int | None = None) -> list[psutil.Process]:
    """All descendants of a process, of this one by default; zombies too."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def living(but: Collection[int] = ()) -> list[psutil.Process]:
    """Descendants of this process that are no zombies, but for these pids.

    Zombies that were adopted are reaped, as process 1 would: Ray's workers take a raylet for alive as long as its pid is there.
    """
    out = []
    ours = {process.pid for process in started}
    for process in family():
        with contextlib.suppress(psutil.Error, ChildProcessError):
            if process.status() != psutil.STATUS_ZOMBIE:
                out.append(process)
            elif process.ppid() == os.getpid() and process.pid not in ours:
                os.waitpid(process.pid, os.WNOHANG)
    return [process for process in out if process.pid not in but]


def left_behind(limit_s: float, but: Collection[int] = ()) -> list[str]:
    """Those of `living`, but for RAYS_OWN, that are still there after `limit_s`; returns as soon as there are none."""
    deadline = time.monotonic() + limit_s
    while (found := [p for p in living(but) if not title(p).startswith(RAYS_OWN)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"{p.pid} {title(p)[:120]}" for p in found]


def end(processes: Collection[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
