"""CPU and memory available to a process: a container's limits as well as the hardware.

Control groups of both versions are read, from the process's own up to the root: the tightest limit counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""The least value in bytes that means no limit: version 1 writes the largest multiple of a page."""


def usable_cpus() -> int:
    """The cores that this process may keep busy at once: those of its affinity, or as many as its quota allows; 1 or more."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """The CPUs that the control groups of this process may use on average; None: unlimited."""
    found = []
    for folder in _folders("cpu", root, membership):
        match _words(folder / "cpu.max"):
            case [quota, period] if quota != "max":
                found.append(float(quota) / float(period))
        match _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us"):
            case [quota], [period] if float(quota) > 0:
                found.append(float(quota) / float(period))
    return min(found, default=None)


def total_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """The bytes of memory for processes here: the machine's, or what a control group of this process allows if that is less."""
    total = int(psutil.virtual_memory().total)
    return min([total, *(limit for _, limit, _ in _memory_limits(root, membership))])


def free_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """The bytes that can be taken before the machine, or a control group of this process, is out of memory."""
    free = int(psutil.virtual_memory().available)
    limits = _memory_limits(root, membership)
    return min([free, *(max(0, limit - used + _reclaimable(folder)) for folder, limit, used in limits)])


def _memory_limits(root: Path, membership: Path) -> Iterator[tuple[Path, int, int]]:
    """The (control group, limit in bytes, bytes in use) of control groups with a limit."""
    for folder in _folders("memory", root, membership):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            match _words(folder / limit_name), _words(folder / used_name):
                case [limit], [used] if limit.isdecimal() and used.isdecimal() and int(limit) < UNLIMITED:
                    yield folder, int(limit), int(used)


def _reclaimable(folder: Path) -> int:
    """The bytes of file cache that a control group holds and would give back."""
    words = _words(folder / "memory.stat")
    stat = dict(zip(words[::2], words[1::2], strict=False))
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))


def _folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """The folders of the control groups that this process is in, the innermost first."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / controller if controllers else root
        inner = PurePosixPath(path.lstrip("/"))
        yield from (base / part for part in (inner, *inner.parents) if ".." not in part.parts)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
