"""One environment worker as its pool sees it, and how environment workers are started."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.environment.actor import EnvironmentActor
from actors.places import placed
from actors.reward.users_worker import UsersWorkerKind, error_of
from actors.runtime import Actors, start_named, within
from actors.supervise import Worker
from grpo_ray.config.environment import ENVIRONMENT_POOL, EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig

MAX_CONCURRENCY = 100_000
"""The calls of one worker at once: each episode that waits for a place is one."""


@dataclass(eq=False, slots=True)
class EnvironmentWorker(Worker):
    """One slot of the pool."""

    pid: int | None = None
    described: dict[str, Any] = field(default_factory=dict)
    """What its environments are, by name; see `described.Described`."""


class EnvironmentWorkerKind(UsersWorkerKind):
    """Starts environment workers; implements `supervise.WorkerKind`."""

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
        super().__init__(config, "environments")
        self.max_restarts = max_restarts
        self._functions = functions
        self._run_dir = run_dir
        self._start_timeout_s = start_timeout_s
        self._source = source

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
            raise error_of(e, worker.name) from e
        worker.pid, worker.described = told["pid"], told["described"]
