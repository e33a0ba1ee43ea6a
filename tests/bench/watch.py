"""A command under a deadline, with what its whole process tree takes: memory at its most, CPU seconds after each step."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

POLL_S = 0.25
TREE_EVERY_S = 1.0
STOP_S = 120.0
"""For a command that was told to end."""


@dataclass
class Watched:
    seconds: float = 0.0
    """Of the whole command."""
    peak_bytes: int = 0
    """Resident memory, summed over the tree: pages that processes share count for each of them."""
    peak_learner_bytes: int = 0
    """Of the one process called LearnerActor that had most."""
    cpu_s: dict[int, float] = field(default_factory=dict)
    """Step -> CPU seconds of the tree when its line was first seen."""


def watch(
    command: Sequence[str],
    *,
    steps: Callable[[], list[dict[str, Any]]],
    log: Path,
    limit_s: float,
    env: Mapping[str, str],
    done: Callable[[list[dict[str, Any]]], bool] = lambda lines: False,
) -> Watched:
    """Run a command to its end, or send SIGTERM when its lines say that it is `done`.

    Args:
        steps: reads the lines of its steps.
        log: gets its output.
        env: over this process' own.

    Raises:
        SystemExit: it fails, or takes longer than `limit_s`; with the end of its output.
    """
    out, started, told = Watched(), time.monotonic(), 0.0
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | env)
        counter = _Tree(process.pid)
        looked = 0.0
        try:
            while process.poll() is None:
                time.sleep(POLL_S)
                now, lines = time.monotonic(), steps()
                if now - started > limit_s or (told and now - told > STOP_S):
                    raise SystemExit(f"{' '.join(command)} took more than {limit_s:g} s:\n{_tail(log)}")
                last = lines[-1]["step"] if lines else 0
                if last not in out.cpu_s or now - looked > TREE_EVERY_S:
                    cpu_s, resident, learner = counter.measure()
                    out.cpu_s.setdefault(last, cpu_s)
                    out.peak_bytes = max(out.peak_bytes, resident)
                    out.peak_learner_bytes = max(out.peak_learner_bytes, learner)
                    looked = now
                if not told and done(lines):
                    process.send_signal(signal.SIGTERM)
                    told = now
        finally:
            counter.kill()
    out.seconds = time.monotonic() - started
    if process.returncode and not told:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}:\n{_tail(log)}")
    return out


class _Tree:
    """A process and all that came from it. What is orphaned, or ends, stays counted with what it had taken when last seen."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._known: dict[psutil.Process, float] = {}

    def measure(self) -> tuple[float, int, int]:
        """CPU seconds so far, resident bytes now, and those of the largest learner."""
        resident = learner = 0
        for process in self._alive():
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self._known[process] = times.user + times.system
                    rss = process.memory_info().rss
                    title = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            resident += rss
            if "LearnerActor" in title:
                learner = max(learner, rss)
        return sum(self._known.values()), resident, learner

    def kill(self) -> None:
        """Whatever is left of it."""
        for process in self._alive():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(self._known, timeout=STOP_S)

    def _alive(self) -> list[psutil.Process]:
        try:
            found = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        return [p for p in dict.fromkeys([*self._known, *found]) if p.is_running()]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:])
