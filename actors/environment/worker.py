"""One environment worker as its pool sees it, and how environment workers are started."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.deaths import KernelKills, fate, is_lost, kind_of, memory_wait_s
from actors.environment.actor import EnvironmentActor
from actors.places import placed
from actors.runtime import Actors, start_named, within
from actors.supervise import Worker
from grpo_ray.config.environment import ENVIRONMENT_POOL, EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError, WorkerError

SILENT_S = 60.0
"""A worker that does not answer a probe within this many seconds hangs as a whole, and is ended."""
STOP_TIMEOUT_S = 10.0
MAX_CONCURRENCY = 100_000
"""The calls of one worker at once: each episode that waits for a place is one."""


@dataclass(eq=False, slots=True)
class EnvironmentWorker(Worker):
    """One slot of the pool."""

    pid: int | None = None
    described: dict[str, Any] = field(default_factory=dict)
    """What its environments are, by name; see `described.Described`."""


class EnvironmentWorkerKind:
    """Starts environment workers; implements `supervise.WorkerKind`."""

    probe_s = SILENT_S
    stop_s = STOP_TIMEOUT_S

    def __init__(
        self,
        config: EnvironmentConfig,
        functions: tuple[RewardFunctionConfig, ...],
        run_dir: str,
        *,
        start_timeout_s: float,
        max_restarts: int,
        source: Actors,
    ) -> None:
        """`functions`: the reward functions of users, some of which may name `environments`."""
        self.config = config
        self.max_restarts = max_restarts
        self._functions = functions
        self._run_dir = run_dir
        self._start_timeout_s = start_timeout_s
        self._source = source
        self._kernel = KernelKills()

    def make(self, index: int) -> EnvironmentWorker:
        return EnvironmentWorker(index, f"{ENVIRONMENT_POOL}-{index}")

    def launch(self, worker: EnvironmentWorker) -> Any:
        return start_named(
            self._source,
            EnvironmentActor,
            self.config,
            self._functions,
            self._run_dir,
            worker.name,
            self._start_timeout_s,
            run_dir=self._run_dir,
            name=worker.name,
            num_cpus=self.config.num_cpus,
            **placed(self.config),
            max_restarts=0,
            max_concurrency=MAX_CONCURRENCY,
        )

    async def ready(self, worker: EnvironmentWorker, limit_s: float) -> None:
        """See `supervise.WorkerKind`; raises RewardError when a class can't be used."""
        try:
            told = await within(worker.handle.start.remote(), limit_s, f"start of {worker.name}", "deadlines.start_s")
        except RayError as e:
            raise _error_of(e, worker.name) from e
        worker.pid, worker.described = told["pid"], told["described"]

    def waits_for(self) -> str:
        asked = {"CPU": self.config.num_cpus, **self.config.resources}
        where = f" on a node with the labels {dict(self.config.labels)}" if self.config.labels else ""
        return (
            f"it imports its environments, or waits for {({k: v for k, v in asked.items() if v}) or 'a place'}{where}"
        )

    def backoff_s(self, worker: EnvironmentWorker, cause: BaseException) -> float:
        """The wait is for memory alone: others may need it only for a moment."""
        return memory_wait_s(worker.restarts + 1) if kind_of(cause) == "out of memory" else 0.0

    def fate(self, error: BaseException, worker: EnvironmentWorker) -> str:
        """See `deaths.fate`."""
        return fate(error, worker.name, self._kernel)

    def probe(self, handle: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = handle.ping.remote()
        return answer

    def stop(self, handle: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = handle.stop.remote()
        return answer


def _error_of(error: BaseException, name: str) -> Exception:
    """The error for users: Ray's wrapping holds a remote traceback, and they get the message alone."""
    inner = getattr(error, "cause", error)
    if isinstance(inner, RewardError):
        return RewardError(str(inner))
    if is_lost(error):
        return WorkerError(f"{name} died: {fate(error, name)}")
    return WorkerError(f"{name} failed: {type(inner).__name__}: {inner}")
