"""All environment workers: started, probed, restarted, scaled. Samplers use them by their handles (`client`).

start -> members -> told to every sampler -> episodes .. -> a worker dies -> its episodes fail, it restarts -> members -> ..
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from actors.deaths import kind_of
from actors.environment.worker import EnvironmentWorker, EnvironmentWorkerKind
from actors.reward.users_worker import SILENT_S
from actors.runtime import Actors, RayActors, late
from actors.supervise import GivenUpError, Supervisor
from grpo_ray.config.environment import ENVIRONMENT_POOL, EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import DeadlineError, GrpoRayError, RewardError, WorkerError

WATCH_S = 10.0
JOIN_TRIES = 3
MAX_RESTARTS = 8
PING_S = 1.0
"""How often a worker is asked whether it lives."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Members:
    """The environment workers that serve now, as samplers are told of them."""

    handles: tuple[tuple[str, Any], ...]
    """(name with the number of the worker's life, handle) pairs."""
    described: dict[str, Any]
    """Name of an environment -> the fields of its `Described`."""
    broken: str = ""
    """Why there will be none any more."""


class EnvironmentPool:
    """A pool of environment workers; made by `create`."""

    def __init__(
        self,
        config: EnvironmentConfig,
        functions: tuple[RewardFunctionConfig, ...],
        run_dir: str,
        *,
        start_timeout_s: float,
        actors: Actors,
    ) -> None:
        self._run_dir = run_dir
        self._kind = EnvironmentWorkerKind(
            config,
            functions,
            run_dir,
            start_timeout_s=start_timeout_s,
            max_restarts=MAX_RESTARTS,
            source=actors,
        )
        self._supervisor = Supervisor(self._kind, self, actors, config.num_actors, start_timeout_s + 60)
        self._workers = self._supervisor.workers
        self._broken = ""
        self._closed = False
        self.on_change: Callable[[Members], None] = lambda _members: None
        """The callback for a change of the members."""
        self.on_trouble: Callable[[str], None] = log.warning
        """The callback for errors that cost no more than a worker."""

    @classmethod
    async def create(
        cls,
        config: EnvironmentConfig,
        functions: tuple[RewardFunctionConfig, ...],
        run_dir: str,
        *,
        start_timeout_s: float = 600.0,
        actors: Actors | None = None,
    ) -> EnvironmentPool:
        """Start `config.num_actors` workers.

        Raises:
            RewardError: naming the class or tool that can't be used.
            DeadlineError: the workers did not start in time.
            WorkerError: a worker died while starting.
        """
        pool = cls(config, functions, run_dir, start_timeout_s=start_timeout_s, actors=actors or RayActors())
        try:
            await pool._supervisor.start_all()
        except BaseException:
            await pool.close()
            raise
        pool._supervisor.spawn(pool._supervisor.watch(lambda: WATCH_S))
        return pool

    async def close(self) -> None:
        """End every worker and its processes."""
        self._closed = True
        await self._supervisor.close()

    @property
    def members(self) -> Members:
        serving = [w for w in self._workers.values() if w.alive and not w.leaving]
        described = next((w.described for w in self._workers.values() if w.described), {})
        return Members(tuple((f"{w.name}/{w.incarnation}", w.handle) for w in serving), described, self._broken)

    # Life and death of workers; see `supervise.Pool`

    def is_busy(self, worker: EnvironmentWorker) -> bool:
        """Whether it may hang: samplers call it directly, so that it may be busy at any time."""
        return worker.alive

    def worker_started(self, worker: EnvironmentWorker) -> None:
        self._supervisor.keep(worker, self._watch(worker))
        self._changed()

    def worker_hangs(self, worker: EnvironmentWorker, incarnation: int) -> None:
        if worker.incarnation == incarnation and not self._closed:
            self.on_trouble(f"{worker.name} did not answer for {SILENT_S:g} s; ending it")
            self._died(worker, WorkerError(f"{worker.name} hung"))

    def worker_restarts(self, worker: EnvironmentWorker, cause: BaseException) -> None:
        why = self._kind.fate(cause, worker)
        (self.on_trouble if kind_of(cause) == "out of memory" else log.warning)(
            f"{worker.name} died and is restarted: {why}"
        )

    async def _watch(self, worker: EnvironmentWorker) -> None:
        """Wait for the worker's death; nobody else does, for its calls come from samplers."""
        life = worker.incarnation
        while worker.alive and worker.incarnation == life:
            try:
                await worker.handle.ping.remote()
            except RayError as e:
                if worker.alive and worker.incarnation == life and not self._closed:
                    self._died(worker, e)
                return
            worker.restarts = 0
            await asyncio.sleep(PING_S)

    def _died(self, worker: EnvironmentWorker, cause: BaseException) -> None:
        worker.alive = False
        self._supervisor.kill(worker)
        self._changed()
        if worker.leaving:
            self._supervisor.remove(worker)
        else:
            self._supervisor.keep(worker, self._restart(worker, cause))

    async def _restart(self, worker: EnvironmentWorker, cause: BaseException) -> None:
        try:
            if not await self._supervisor.restart(worker, cause):
                self._supervisor.remove(worker)
        except GivenUpError as e:
            self._break(
                str(late(f"start of {worker.name}", self._supervisor.limit_s, "deadlines.start_s") if e.late else e)
            )
        except GrpoRayError as e:
            self._break(str(e))

    def _break(self, why: str) -> None:
        self._broken = f"{why}; see {self._run_dir}/logs"
        self._changed()

    def _changed(self) -> None:
        if not self._closed:
            self.on_change(self.members)

    # Members

    def scale(self, number: int) -> None:
        """Change the number of workers, to 1 or more. One that leaves ends at once; its episodes are drawn again elsewhere."""
        if self._closed:
            return
        joining, leaving = self._supervisor.scale(number, lambda worker: -worker.index)
        for worker in joining:
            self._supervisor.keep(worker, self._join(worker))
        for worker in leaving:
            self._supervisor.remove(worker)
        self._changed()

    async def _join(self, worker: EnvironmentWorker) -> None:
        try:
            await self._supervisor.join(worker, JOIN_TRIES)
        except (RewardError, DeadlineError, WorkerError) as e:
            self.on_trouble(f"{worker.name} was to join and does not start: {e}")
            self._supervisor.remove(worker)

    # Reports

    @property
    def pids(self) -> dict[str, int]:
        """The process id of each worker, by name, for debugging and chaos tests."""
        return {w.name: w.pid for w in self._workers.values() if w.pid is not None}

    def live(self) -> dict[str, float]:
        """The pool's figures of this moment."""
        return {
            f"alive/{ENVIRONMENT_POOL}": float(self._supervisor.num_alive),
            f"restarts/{ENVIRONMENT_POOL}": float(self._supervisor.num_restarts),
        }
