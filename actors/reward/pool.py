"""All reward workers as one `grpo_ray.loop.roles.Scorer`.

    score -> requests: queue -> an idle worker takes its share -> RewardActor.score -> futures
                        ^                                                        |
                        +---------- the worker died; supervise restarts it ------+

A worker that has answered takes more: the one that asks is the least loaded. What a dying worker held returns to the head of
the queue; samples over which workers died again and again end the pool. `scale` changes the number of workers at any time: one that
leaves ends when it has done what it took.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from actors.deaths import fate, is_lost, kind_of
from actors.reward.actor import FETCH_TIMEOUT_S
from actors.reward.process import START_TRIES
from actors.reward.requests import PendingScores, ScoreDispatch
from actors.reward.users_worker import SILENT_S, error_of
from actors.reward.worker import RewardWorker, RewardWorkerKind
from actors.runtime import Actors, RayActors, late
from actors.supervise import GivenUpError, Supervisor
from grpo_ray.config.reward import SHARED_POOL, RewardConfig
from grpo_ray.errors import DeadlineError, RewardError, WorkerError
from grpo_ray.types import Score, ScoreRequest, Track

WATCH_S = 10.0
JOIN_TRIES = 3
log = logging.getLogger(__name__)


class RewardPool:
    """Scores samples with a pool of workers; made by `create`."""

    def __init__(
        self,
        config: RewardConfig,
        run_dir: str,
        *,
        name: str,
        start_timeout_s: float,
        max_restarts: int,
        actors: Actors,
        with_environments: bool = False,
    ) -> None:
        self.name = name
        self._run_dir = run_dir
        tries = len(config.functions) * (1 + config.on_failure.retries)
        self._longest_s = tries * (config.timeout_s + START_TRIES * start_timeout_s)
        """The longest that a sample may take: every function to its deadline, with every retry and restart."""
        self._kind = RewardWorkerKind(
            config,
            run_dir,
            name,
            start_timeout_s=start_timeout_s,
            max_restarts=max_restarts,
            source=actors,
            with_environments=with_environments,
        )
        # An actor starts, and then its process, which is allowed `start_timeout_s`.
        self._supervisor = Supervisor(self._kind, self, actors, config.num_actors, start_timeout_s + 60)
        self._workers = self._supervisor.workers
        """The workers by index."""
        self._dispatch = ScoreDispatch(
            self._workers, self._limit_s, on_answered=self._answered, on_failed=self._call_failed
        )
        self.on_trouble: Callable[[str], None] = log.warning
        """The callback for errors that cost no more than a worker."""

    @classmethod
    async def create(
        cls,
        config: RewardConfig,
        run_dir: str,
        *,
        name: str = SHARED_POOL,
        start_timeout_s: float = 600.0,
        max_restarts: int = 8,
        actors: Actors | None = None,
        with_environments: bool = False,
    ) -> RewardPool:
        """Start `config.num_actors` workers, named `{name}-0` and so on, and import every reward function in each.

        Args:
            max_restarts: how many workers that died over the same samples, or while starting at one index, are replaced.
            with_environments: whether the run has environments, beside which functions that name them are called.

        Raises:
            RewardError: naming the function that can't be imported.
            DeadlineError: the workers did not start in time.
            WorkerError: a worker died while starting.
        """
        pool = cls(
            config,
            run_dir,
            name=name,
            start_timeout_s=start_timeout_s,
            max_restarts=max_restarts,
            actors=actors or RayActors(),
            with_environments=with_environments,
        )
        try:
            await pool._supervisor.start_all()
        except BaseException:
            await pool.close()
            raise
        pool._supervisor.spawn(pool._supervisor.watch(lambda: WATCH_S))
        pool._supervisor.spawn(pool._watch_calls())
        return pool

    async def close(self) -> None:
        """End every worker and its scoring process; waiting calls fail with a WorkerError."""
        self._dispatch.close(WorkerError(f"the {self.name} pool is closed"))
        await self._supervisor.close()

    # Scoring

    def score(self, requests: Sequence[ScoreRequest]) -> asyncio.Future[list[Score]]:
        """Score samples; one Score each, in order. See `roles.Scorer`.

        Raises (the future):
            WorkerError: workers died more often than `max_restarts`, or the pool is closed.
            RewardError: a reward function can no longer be imported.
        """
        return self._dispatch.score(requests)

    def _limit_s(self, num_samples: int) -> float:
        """The seconds that one call may take."""
        return FETCH_TIMEOUT_S + num_samples * self._longest_s

    def _answered(self, worker: RewardWorker) -> None:
        if worker.leaving:
            self._supervisor.remove(worker)
        else:
            self._dispatch.free(worker)

    def _call_failed(self, worker: RewardWorker, error: BaseException, batch: Sequence[PendingScores]) -> None:
        if self._dispatch.broken is not None or not is_lost(error):
            self._dispatch.fail(self._dispatch.broken or error_of(error, worker.name))
            return
        for pending in batch:
            pending.deaths += 1
        if worker.leaving:
            self._supervisor.remove(worker)
        else:
            self._died(worker, error, max(pending.deaths for pending in batch))
        self._dispatch.hand_out()

    # Life and death of workers; see `supervise.Pool`

    def is_busy(self, worker: RewardWorker) -> bool:
        return worker.due < math.inf

    def worker_started(self, worker: RewardWorker) -> None:
        self._answered(worker)

    def worker_hangs(self, worker: RewardWorker, incarnation: int) -> None:
        """End a worker that hangs; its call then fails, like every call of a dead worker."""
        if worker.incarnation == incarnation and self._dispatch.broken is None:
            self.on_trouble(f"{worker.name} did not answer for {SILENT_S:g} s; ending it")
            self._supervisor.kill(worker)

    def worker_restarts(self, worker: RewardWorker, cause: BaseException) -> None:
        cause = _root(cause)
        why = self._kind.fate(cause, worker)
        (self.on_trouble if kind_of(cause) == "out of memory" else log.warning)(
            f"{worker.name} died and is restarted: {why}"
        )

    async def _watch_calls(self) -> None:
        """End workers whose call is overdue; it then fails, like every call of a dead worker."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = asyncio.get_running_loop().time()
            for worker in list(self._workers.values()):
                if now > worker.due:
                    log.warning("%s did not finish scoring in time (reward.timeout_s); ending it", worker.name)
                    worker.due = math.inf
                    self._supervisor.kill(worker)

    def _died(self, worker: RewardWorker, cause: BaseException, deaths: int) -> None:
        """Restart a worker; `deaths` is the number of workers that died over what it held."""
        worker.alive = False
        worker.restarts = deaths - 1
        self._supervisor.kill(worker)
        self._supervisor.keep(worker, self._restart(worker, cause))

    async def _restart(self, worker: RewardWorker, cause: BaseException) -> None:
        """Start another worker under the same name; the pool fails if what it held ends workers, or none starts any more."""
        try:
            if not await self._supervisor.restart(worker, cause):
                self._supervisor.remove(worker)
        except GivenUpError as e:
            self._dispatch.fail(self._given_up(worker, e))
        except RewardError as e:
            self._dispatch.fail(e)

    def _given_up(self, worker: RewardWorker, why: GivenUpError) -> Exception:
        if why.late:
            return late(f"start of {worker.name}", self._supervisor.limit_s, "deadlines.start_s")
        return WorkerError(
            f"{worker.name} died, as {self._kind.max_restarts} before it over the same samples or while starting; see "
            f"{self._run_dir}/logs/{worker.name}.log. The last time: {fate(_root(why.cause), worker.name)}"
        )

    # Members

    def scale(self, number: int) -> None:
        """Change the number of workers, to 1 or more; each that joins serves as soon as it has started."""
        if self._dispatch.broken is not None:
            return
        joining, leaving = self._supervisor.scale(number, lambda worker: -worker.index)
        for worker in joining:
            self._supervisor.keep(worker, self._join(worker))
        for worker in leaving:
            if self._dispatch.withdraw(worker) or not worker.started:
                self._supervisor.remove(worker)

    async def _join(self, worker: RewardWorker) -> None:
        """Start a worker for a running pool; one that does not start is dropped and breaks nothing."""
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

    def take_most_waiting(self) -> int:
        """The most samples that waited while every worker was busy, since the last call."""
        return self._dispatch.take_most_waiting()

    def live(self) -> dict[str, float]:
        """The pool's figures of this moment."""
        return {
            f"queue/{self.name}": float(self._dispatch.num_waiting),
            f"alive/{self.name}": float(self._supervisor.num_alive),
            f"restarts/{self.name}": float(self._supervisor.num_restarts),
        }

    def take_tracks(self) -> list[Track]:
        """When each worker was busy `scoring` since the last call, from the call to its answer."""
        return self._supervisor.take_tracks()


def _root(error: BaseException) -> BaseException:
    """What Ray reported of a worker whose start failed."""
    return (error.__cause__ or error) if isinstance(error, WorkerError) else error
