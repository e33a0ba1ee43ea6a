"""All reward workers as one: implements `grpo_ray.roles.Scorer`.

    score -> queue -> an idle worker takes its share -> RewardActor.score -> futures
               ^                                            |
               +--------------- the worker died ------------+

A worker that has answered takes more: the least loaded one is the one that asks. What a dying worker held goes back to the head of
the queue; samples over which workers died again and again end the pool. `scale` changes the number of workers at any time: one that
leaves ends when it has done what it took.

By callbacks: a task for each worker would cost the controller a turn of the event loop more for each sample.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from actors.cluster import placed
from actors.deaths import KernelKills, fate, is_lost, kind_of, memory_wait_s
from actors.reward import FETCH_TIMEOUT_S, RewardActor
from actors.reward_process import START_TRIES
from actors.runtime import Actors, RayActors, again_within, late, start_named, within
from grpo_ray.activity import IDLE, Activity
from grpo_ray.answers import Answer
from grpo_ray.config_reward import SHARED_POOL, RewardConfig
from grpo_ray.errors import DeadlineError, RewardError, WorkerError
from grpo_ray.types import Score, ScoreRequest, Track

MAX_BATCH = 64
"""Samples in one call: enough to make Ray's share of the cost small, few enough to spread over the workers."""
WATCH_S = 10.0
SILENT_S = 60.0
"""A worker that has a call and does not answer another one for so long hangs as a whole, and is ended."""
STOP_TIMEOUT_S = 10.0
JOIN_TRIES = 3
LATE_S = 60.0
"""A start that takes longer is told of."""
log = logging.getLogger(__name__)


class _Waiting(Answer[list[Score]]):
    """One call of `score`, and its answer."""

    __slots__ = ("deaths", "requests")

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        super().__init__()
        self.requests = list(requests)
        self.deaths = 0
        """Of workers that held it."""


@dataclass(eq=False, slots=True)
class _Worker:
    """One place in the pool, through the lives of its actor."""

    index: int
    name: str
    activity: Activity
    started: bool = False
    """It has been alive."""
    alive: bool = False
    actor: Any = None
    batch: list[_Waiting] = field(default_factory=list)
    """What it has been called with."""
    due: float = math.inf
    """When the call under way must have ended."""
    asked: asyncio.Task[None] | None = None
    """Whether it lives."""
    starting: asyncio.Task[None] | None = None
    """Joins the pool, or takes the place of one that died."""
    leaving: bool = False


class RewardPool:
    """Make one with `create`."""

    def __init__(
        self,
        config: RewardConfig,
        run_dir: str,
        *,
        name: str,
        start_timeout_s: float,
        max_restarts: int,
        actors: Actors,
    ) -> None:
        self._config = config
        self._run_dir = run_dir
        self.name = name
        self._start_timeout_s = start_timeout_s
        tries = len(config.functions) * (1 + config.on_failure.retries)
        self._longest_s = tries * (config.timeout_s + START_TRIES * start_timeout_s)
        """That a sample may take: every function to its deadline, with every retry and restart."""
        self._start_limit_s = start_timeout_s + 60
        """Of an actor; its process is allowed `start_timeout_s`."""
        self._start_s = 0.0
        """The longest start so far."""
        self._died_at = 0.0
        """When a worker did, the last time."""
        self._max_restarts = max_restarts
        self._num_restarts = 0
        self._source = actors
        self._queue: deque[_Waiting] = deque()
        self._num_waiting = 0
        """Samples in the queue."""
        self._most_waiting = 0
        self._idle: deque[_Worker] = deque()
        """Those that wait for work, the longest first."""
        self._kicked = False
        self._workers = {i: _new_worker(name, i) for i in range(config.num_actors)}
        """By index."""
        self._left: list[_Worker] = []
        """That have something to tell yet."""
        self.pids: dict[str, int] = {}
        """Name of each worker -> its process, for people and chaos tests."""
        self._watching: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        """Of workers that leave."""
        self._broken: Exception | None = None
        self._kernel = KernelKills()
        self.on_trouble: Callable[[str], None] = log.warning
        """Told what went wrong and costs nothing but a worker."""

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
    ) -> RewardPool:
        """Start `config.num_actors` workers, named `{name}-0` and so on, and import every reward function in each.

        `max_restarts`: how many workers are replaced that died over the same samples, or while starting in one place.

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
        )
        try:
            await asyncio.gather(*(pool._start(w, pool._start_limit_s) for w in pool._workers.values()))
        except BaseException:
            await pool.close()
            raise
        for worker in pool._workers.values():
            pool._free(worker)
        pool._watching = asyncio.create_task(pool._watch())
        return pool

    def score(self, requests: Sequence[ScoreRequest]) -> asyncio.Future[list[Score]]:
        """Score samples; one Score each, in order. See `roles.Scorer`.

        Raises (the future):
            WorkerError: workers died more often than `max_restarts`, or the pool is closed.
            RewardError: a reward function can no longer be imported.
        """
        waiting = _Waiting(requests)
        if self._broken is not None:
            waiting.set_exception(self._broken)
        elif not requests:
            waiting.set_result([])
        else:
            self._queue.append(waiting)
            self._num_waiting += len(requests)
            if len(self._queue) > len(self._idle):
                self._most_waiting = max(self._most_waiting, self._num_waiting)
            if self._idle and not self._kicked:
                # Called in the next turn of the event loop; everything that is put in during this one is there by then.
                self._kicked = True
                asyncio.get_running_loop().call_soon(self._hand_out)
        return waiting

    def scale(self, number: int) -> None:
        """From now on so many workers, 1 or more. Each that joins serves as soon as it has started."""
        if self._broken is not None:
            return
        staying = {i: w for i, w in self._workers.items() if not w.leaving}
        free = (i for i in itertools.count() if i not in self._workers)
        for index in [next(free) for _ in range(number - len(staying))]:
            self._workers[index] = worker = _new_worker(self.name, index)
            self._start_aside(worker, self._join(worker))
        for index in sorted(staying)[number:]:
            worker = staying[index]
            worker.leaving = True
            if worker in self._idle:
                self._idle.remove(worker)
                self._remove(worker)
            elif not worker.started and worker.starting is not None:
                worker.starting.cancel()
                self._remove(worker)

    def take_most_waiting(self) -> int:
        """Samples that waited while every worker was busy, at most, since the last call."""
        most, self._most_waiting = self._most_waiting, 0
        return most

    def live(self) -> dict[str, float]:
        """At this moment."""
        return {
            f"queue/{self.name}": float(sum(len(w.requests) for w in self._queue)),
            f"alive/{self.name}": float(sum(w.alive for w in self._workers.values())),
            f"restarts/{self.name}": float(self._num_restarts),
        }

    def take_tracks(self) -> list[Track]:
        """Since the last call: when each worker was busy `scoring`, from the call to its answer."""
        told = [*(w for w in self._workers.values() if w.started), *self._left]
        self._left = []
        return [worker.activity.take() for worker in told]

    async def close(self) -> None:
        """End every worker and its scoring process. Calls still waiting get a WorkerError."""
        workers = list(self._workers.values())
        for worker in workers:
            self._queue.extend(worker.batch)
        self._fail(WorkerError(f"the {self.name} pool is closed"))
        tasks = [t for t in (self._watching, *(t for w in workers for t in (w.asked, w.starting))) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(self._stop(w.actor) for w in workers if w.actor is not None), *self._ending)
        for worker in workers:
            worker.actor = None

    async def _join(self, worker: _Worker) -> None:
        """A pool that works is not broken by one that can't join it."""
        for left in reversed(range(JOIN_TRIES)):
            try:
                await self._start(worker, self._start_limit_s)
            except (RewardError, DeadlineError, WorkerError) as e:
                again = left > 0 and not isinstance(e, RewardError)
                self.on_trouble(
                    f"{worker.name} was to join and does not start{', it is tried again' if again else ''}: {e}"
                )
                if not again:
                    self._remove(worker)
                    return
                self._source.kill(worker.actor)
            else:
                self._free(worker)
                return

    def _remove(self, worker: _Worker) -> None:
        del self._workers[worker.index]
        self.pids.pop(worker.name, None)
        if worker.started:
            self._left.append(worker)
        if worker.actor is None:
            return
        ending = asyncio.create_task(self._stop(worker.actor))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    def _start_aside(self, worker: _Worker, work: Coroutine[Any, Any, None]) -> None:
        worker.starting = asyncio.create_task(work, name=f"start of {worker.name}")

    def _free(self, worker: _Worker) -> None:
        """It has nothing to do."""
        if worker.leaving:
            self._remove(worker)
        else:
            self._idle.append(worker)
            self._hand_out()

    def _hand_out(self) -> None:
        self._kicked = False
        while self._idle and self._queue:
            batch, num_samples = self._take()
            if batch:
                self._call(self._idle.popleft(), batch, num_samples)

    def _take(self) -> tuple[list[_Waiting], int]:
        """One worker's share of what waits, at least one item if any is wanted still, up to MAX_BATCH samples; and how many samples
        that are."""
        share = min(MAX_BATCH, -(-self._num_waiting // len(self._workers)))
        batch: list[_Waiting] = []
        taken = 0
        while self._queue and (not batch or taken + len(self._queue[0].requests) <= share):
            item = self._queue.popleft()
            self._num_waiting -= len(item.requests)
            if not item.done():
                batch.append(item)
                taken += len(item.requests)
        return batch, taken

    def _call(self, worker: _Worker, batch: list[_Waiting], num_samples: int) -> None:
        worker.batch = batch
        worker.due = asyncio.get_running_loop().time() + FETCH_TIMEOUT_S + num_samples * self._longest_s
        worker.activity.enter("scoring")
        try:
            call = worker.actor.score.remote([w.requests for w in batch])
        except Exception as e:
            self._call_failed(worker, e)
        else:
            asyncio.wrap_future(call.future()).add_done_callback(partial(self._answered, worker))

    def _answered(self, worker: _Worker, answer: asyncio.Future[list[list[Score]]]) -> None:
        try:
            results = answer.result()
        except (Exception, asyncio.CancelledError) as e:
            self._call_failed(worker, e)
            return
        for waiting, scores in zip(self._end_call(worker), results, strict=True):
            if not waiting.done():
                waiting.set_result(scores)
        self._free(worker)

    def _call_failed(self, worker: _Worker, error: BaseException) -> None:
        batch = self._end_call(worker)
        self._queue.extendleft(reversed(batch))
        self._num_waiting += sum(len(w.requests) for w in batch)
        if self._broken is not None or not is_lost(error):
            self._fail(self._broken or _cause(error, worker.name))
            return
        for waiting in batch:
            waiting.deaths += 1
        if worker.leaving:
            self._remove(worker)
        else:
            worker.alive = False
            self._start_aside(worker, self._replace(worker, error, max(waiting.deaths for waiting in batch)))
        self._hand_out()

    def _end_call(self, worker: _Worker) -> list[_Waiting]:
        batch, worker.batch = worker.batch, []
        worker.due = math.inf
        worker.activity.enter(IDLE)
        return batch

    async def _watch(self) -> None:
        """Ends workers whose call is overdue, and those that hang: the call then fails like every call of a dead worker."""
        while True:
            await asyncio.sleep(WATCH_S)
            now = asyncio.get_running_loop().time()
            for worker in self._workers.values():
                if now > worker.due:
                    log.warning("%s did not finish scoring in time (reward.timeout_s); ending it", worker.name)
                    worker.due = math.inf
                    self._source.kill(worker.actor)
                elif worker.due < math.inf and (worker.asked is None or worker.asked.done()):
                    worker.asked = asyncio.create_task(self._ask(worker, worker.actor))

    async def _ask(self, worker: _Worker, actor: Any) -> None:
        try:
            await asyncio.wait_for(actor.ping.remote(), SILENT_S)
        except TimeoutError:
            if worker.actor is actor and self._broken is None:
                self.on_trouble(f"{worker.name} did not answer for {SILENT_S:g} s; ending it")
                self._source.kill(actor)
        except ray.exceptions.RayError:
            log.debug("%s is dead, and so is its call", worker.name)

    async def _start(self, worker: _Worker, limit_s: float) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        worker.actor = start_named(
            self._source,
            RewardActor,
            self._config,
            self._run_dir,
            worker.name,
            self._start_timeout_s,
            run_dir=self._run_dir,
            name=worker.name,
            num_cpus=self._config.num_cpus,
            num_gpus=self._config.num_gpus,
            **placed(self._config),
            max_restarts=0,
        )
        try:
            self.pids[worker.name] = await within(
                worker.actor.start.remote(),
                limit_s,
                f"start of {worker.name}",
                "deadlines.start_s",
            )
        except ray.exceptions.RayError as e:
            raise _cause(e, worker.name) from e
        worker.started = worker.alive = True
        self._start_s = max(self._start_s, loop.time() - began)

    async def _replace(self, worker: _Worker, cause: BaseException, deaths: int) -> None:
        """Start another worker under the same name, unless `deaths` says that what it held ends workers; else the pool fails.

        A start that takes far longer than those before it (the worker hangs, or its node is gone and nowhere is room) is begun
        again with twice the time; while no other worker lives, as long as a start may take.
        """
        tries = self._max_restarts + 1 - deaths
        time = asyncio.get_running_loop().time
        self._died_at = time()
        patience_s = again_within(self._start_s, self._start_limit_s)
        memory_deaths = 0
        while tries > 0 and not worker.leaving:
            self._num_restarts += 1
            why = fate(cause, worker.name, self._kernel)
            (self.on_trouble if kind_of(cause) == "out of memory" else log.warning)(
                f"{worker.name} died and is restarted: {why}"
            )
            self._source.kill(worker.actor)
            if kind_of(cause) == "out of memory":
                memory_deaths += 1
                await asyncio.sleep(memory_wait_s(deaths + memory_deaths))
            told = asyncio.get_running_loop().call_later(
                LATE_S, self.on_trouble, f"{worker.name} has not started again for {LATE_S:g} s: {self._room}"
            )
            alone = not any(other.alive for other in self._workers.values())
            left_s = self._died_at + self._start_limit_s - time()
            try:
                await self._start(worker, min(patience_s, left_s) if alone else patience_s)
                return self._free(worker)
            except WorkerError as e:
                cause = e.__cause__ or e
                tries -= 1
            except DeadlineError as e:
                late_s = time() - self._died_at
                if late_s >= self._start_limit_s and not any(other.alive for other in self._workers.values()):
                    return self._fail(late(f"start of {worker.name}", self._start_limit_s, "deadlines.start_s"))
                cause = e
                patience_s = min(2 * patience_s, self._start_limit_s)
            except RewardError as e:
                return self._fail(e)
            finally:
                told.cancel()
        if worker.leaving:
            return self._remove(worker)
        return self._fail(
            WorkerError(
                f"{worker.name} died, as {self._max_restarts} before it over the same samples or while starting; see "
                f"{self._run_dir}/logs/{worker.name}.log. The last time: {fate(cause, worker.name)}"
            )
        )

    @property
    def _room(self) -> str:
        """What a worker that does not start may be waiting for."""
        asked = {"CPU": self._config.num_cpus, "GPU": self._config.num_gpus, **self._config.resources}
        where = f" on a node with the labels {dict(self._config.labels)}" if self._config.labels else ""
        return f"it imports its functions, or waits for {({k: v for k, v in asked.items() if v}) or 'a place'}{where}"

    def _fail(self, error: Exception) -> None:
        """The pool is of no more use: tell everyone who waits."""
        self._broken = self._broken or error
        self._num_waiting = 0
        while self._queue:
            waiting = self._queue.popleft()
            if not waiting.done():
                waiting.set_exception(error)

    async def _stop(self, actor: Any) -> None:
        try:
            await asyncio.wait_for(actor.stop.remote(), STOP_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError):
            log.debug("a reward worker did not stop by itself; killing it")
        self._source.kill(actor)


def _new_worker(pool: str, index: int) -> _Worker:
    name = f"{pool}-{index}"
    return _Worker(index, name, Activity(name))


def _cause(error: BaseException, name: str) -> Exception:
    """Ray's wrapping holds a remote traceback; users get the message alone."""
    inner = getattr(error, "cause", error)
    if isinstance(inner, RewardError):
        return RewardError(str(inner))
    if is_lost(error):
        return WorkerError(f"{name} died: {fate(error, name)}")
    return WorkerError(f"{name} failed: {type(inner).__name__}: {inner}")
