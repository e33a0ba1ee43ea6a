"""One reward worker as its pool sees it, and how reward workers are started."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.deaths import KernelKills, fate, is_lost, kind_of, memory_wait_s
from actors.places import placed
from actors.reward.actor import RewardActor
from actors.reward.requests import PendingScores
from actors.runtime import Actors, start_named, within
from actors.supervise import Worker
from grpo_ray.config.reward import RewardConfig
from grpo_ray.errors import RewardError, WorkerError
from grpo_ray.types import Score, ScoreRequest

SILENT_S = 60.0
"""A worker that has a call and does not answer another one within this many seconds hangs as a whole, and is ended."""
STOP_TIMEOUT_S = 10.0


@dataclass(eq=False, slots=True)
class RewardWorker(Worker):
    """One slot of the pool; implements `requests.ScoringWorker`."""

    pid: int | None = None
    """The process id of the last actor that started."""
    batch: list[PendingScores] = field(default_factory=list)
    due: float = math.inf

    def score(self, groups: list[list[ScoreRequest]]) -> asyncio.Future[list[list[Score]]]:
        return asyncio.wrap_future(self.handle.score.remote(groups).future())


class RewardWorkerKind:
    """Starts reward workers; implements `supervise.WorkerKind`."""

    probe_s = SILENT_S
    stop_s = STOP_TIMEOUT_S

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
        self.config = config
        self.max_restarts = max_restarts
        self._run_dir = run_dir
        self._pool = pool
        self._start_timeout_s = start_timeout_s
        self._source = source
        self._with_environments = with_environments
        self._kernel = KernelKills()

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

    def waits_for(self) -> str:
        asked = {"CPU": self.config.num_cpus, "GPU": self.config.num_gpus, **self.config.resources}
        where = f" on a node with the labels {dict(self.config.labels)}" if self.config.labels else ""
        return f"it imports its functions, or waits for {({k: v for k, v in asked.items() if v}) or 'a place'}{where}"

    def backoff_s(self, worker: RewardWorker, cause: BaseException) -> float:
        """The wait is for memory alone: others may need it only for a moment."""
        return memory_wait_s(worker.restarts + 1) if kind_of(cause) == "out of memory" else 0.0

    def fate(self, error: BaseException, worker: RewardWorker) -> str:
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
