"""One reward worker as its pool sees it, and how reward workers are started."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.places import placed
from actors.reward.actor import RewardActor
from actors.reward.requests import PendingScores
from actors.reward.users_worker import UsersWorkerKind, error_of
from actors.runtime import Actors, start_named, within
from actors.supervise import Worker
from grpo_ray.config.reward import RewardConfig
from grpo_ray.types import Score, ScoreRequest


@dataclass(eq=False, slots=True)
class RewardWorker(Worker):
    """One slot of the pool; implements `requests.ScoringWorker`."""

    pid: int | None = None
    """The process id of the last actor that started."""
    batch: list[PendingScores] = field(default_factory=list)
    due: float = math.inf

    def score(self, groups: list[list[ScoreRequest]]) -> asyncio.Future[list[list[Score]]]:
        return asyncio.wrap_future(self.handle.score.remote(groups).future())


class RewardWorkerKind(UsersWorkerKind):
    """Starts reward workers; implements `supervise.WorkerKind`."""

    def __init__(
        self,
        config: RewardConfig,
        run_dir: str,
        pool: str,
        *,
        start_timeout_s: float,
        max_restarts: int,
        source: Actors,
        with_environments: bool = False,
    ) -> None:
        """`start_timeout_s` is what the scoring process of a worker may take to start."""
        super().__init__(config, "functions")
        self.max_restarts = max_restarts
        self._run_dir = run_dir
        self._pool = pool
        self._start_timeout_s = start_timeout_s
        self._source = source
        self._with_environments = with_environments

    def make(self, index: int) -> RewardWorker:
        return RewardWorker(index, f"{self._pool}-{index}")

    def launch(self, worker: RewardWorker) -> Any:
        return start_named(
            self._source,
            RewardActor,
            self.config,
            self._run_dir,
            worker.name,
            self._start_timeout_s,
            self._with_environments,
            run_dir=self._run_dir,
            name=worker.name,
            num_cpus=self.config.num_cpus,
            num_gpus=self.config.num_gpus,
            **placed(self.config),
            max_restarts=0,
        )

    async def ready(self, worker: RewardWorker, limit_s: float) -> None:
        """See `supervise.WorkerKind`; raises RewardError when a function can't be imported."""
        try:
            worker.pid = await within(
                worker.handle.start.remote(), limit_s, f"start of {worker.name}", "deadlines.start_s"
            )
        except RayError as e:
            raise error_of(e, worker.name) from e
