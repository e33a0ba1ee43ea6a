"""How workers that run users' code are waited for, probed and ended; their pools' kinds start them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from actors.deaths import KernelKills, fate, is_lost, kind_of, memory_wait_s
from actors.supervise import Worker
from grpo_ray.errors import RewardError, WorkerError

SILENT_S = 60.0
"""A worker that does not answer a probe within this many seconds hangs as a whole, and is ended."""
STOP_TIMEOUT_S = 10.0


class UsersWorkerKind:
    """The part of `supervise.WorkerKind` that does not depend on what the users' code is."""

    probe_s = SILENT_S
    stop_s = STOP_TIMEOUT_S

    def __init__(self, config: Any, imports: str) -> None:
        """
        Args:
            config: a section with `num_cpus`, `resources` and `labels`, and `num_gpus` where its workers may have GPUs.
            imports: what a worker imports while it starts, for errors.
        """
        self.config = config
        self._imports = imports
        self._kernel = KernelKills()

    def waits_for(self) -> str:
        c = self.config
        asked = {"CPU": c.num_cpus, "GPU": getattr(c, "num_gpus", 0), **c.resources}
        where = f" on a node with the labels {dict(c.labels)}" if c.labels else ""
        return f"it imports its {self._imports}, or waits for {({k: v for k, v in asked.items() if v}) or 'a place'}{where}"

    def backoff_s(self, worker: Worker, cause: BaseException) -> float:
        """The wait is for memory alone: others may need it only for a moment."""
        return memory_wait_s(worker.restarts + 1) if kind_of(cause) == "out of memory" else 0.0

    def fate(self, error: BaseException, worker: Worker) -> str:
        """See `deaths.fate`."""
        return fate(error, worker.name, self._kernel)

    def probe(self, handle: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = handle.ping.remote()
        return answer

    def stop(self, handle: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = handle.stop.remote()
        return answer


def error_of(error: BaseException, name: str) -> Exception:
    """The error for users: Ray's wrapping holds a remote traceback, and they get the message alone."""
    inner = getattr(error, "cause", error)
    if isinstance(inner, RewardError):
        return RewardError(str(inner))
    if is_lost(error):
        return WorkerError(f"{name} died: {fate(error, name)}")
    return WorkerError(f"{name} failed: {type(inner).__name__}: {inner}")
