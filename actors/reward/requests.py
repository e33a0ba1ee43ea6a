"""Samples on their way to reward workers and back.

    score -> queue -> an idle worker takes its share -> its call -> the scores
               ^                                          |
               +------- put_back: the worker died --------+

It runs by callbacks: a task for each worker would cost the controller one more turn of the event loop per sample. It knows
workers only by what they hold and by `score`; the pool starts them and detects their deaths.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from grpo_ray.loop.immediate_future import ImmediateFuture
from grpo_ray.telemetry.activity import IDLE, Activity
from grpo_ray.types import Score, ScoreRequest

MAX_BATCH = 64
"""The number of samples in one call: enough to make Ray's share of the cost small, few enough to spread over the workers."""


class PendingScores(ImmediateFuture[list[Score]]):
    """The future of one call of `RewardPool.score`."""

    __slots__ = ("deaths", "requests")

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        super().__init__()
        self.requests = list(requests)
        self.deaths = 0
        """The number of workers that died while they held the call."""

    @property
    def num_samples(self) -> int:
        return len(self.requests)


class ScoreQueue:
    """The calls that no worker has."""

    def __init__(self) -> None:
        self._queue: deque[PendingScores] = deque()
        self.num_samples = 0
        """The number of samples in all calls of the queue."""

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, pending: PendingScores) -> None:
        self._queue.append(pending)
        self.num_samples += pending.num_samples

    def put_back(self, batch: Sequence[PendingScores]) -> None:
        """Queue calls before all others."""
        self._queue.extendleft(reversed(batch))
        self.num_samples += sum(pending.num_samples for pending in batch)

    def take(self, num_workers: int) -> list[PendingScores]:
        """The share of one of so many workers: at least one call if any is still wanted, up to MAX_BATCH samples."""
        share = min(MAX_BATCH, -(-self.num_samples // num_workers))
        batch: list[PendingScores] = []
        taken = 0
        while self._queue and (not batch or taken + self._queue[0].num_samples <= share):
            pending = self._queue.popleft()
            self.num_samples -= pending.num_samples
            if not pending.done():
                batch.append(pending)
                taken += pending.num_samples
        return batch

    def fail(self, error: Exception) -> None:
        """Fail every call that waits."""
        self.num_samples = 0
        while self._queue:
            pending = self._queue.popleft()
            if not pending.done():
                pending.set_exception(error)


class ScoringWorker(Protocol):
    """A worker, as the dispatch sees it."""

    batch: list[PendingScores]
    """The calls whose samples the worker scores now."""
    due: float
    """When the actor's call must have ended, by the event loop's clock; infinite without one."""
    activity: Activity

    def score(self, groups: list[list[ScoreRequest]]) -> asyncio.Future[list[list[Score]]]:
        """Call the worker's actor. An error that is raised at once means the same as one in the future."""
        ...


S = TypeVar("S", bound=ScoringWorker)


class ScoreDispatch(Generic[S]):
    """Hands samples to idle workers and settles what comes back. All methods belong to one event loop."""

    def __init__(
        self,
        workers: Mapping[int, S],
        limit_s: Callable[[int], float],
        *,
        on_answered: Callable[[S], None],
        on_failed: Callable[[S, BaseException, list[PendingScores]], None],
    ) -> None:
        """
        Args:
            limit_s: number of samples -> seconds that a call with them may take.
            on_answered: called with a worker that is idle; `free` gives it more.
            on_failed: called with a worker whose call failed; what it held waits again.
        """
        self._workers = workers
        self._limit_s = limit_s
        self._on_answered = on_answered
        self._on_failed = on_failed
        self._queue = ScoreQueue()
        self._most_waiting = 0
        self._idle: deque[S] = deque()
        """The idle workers, the longest idle first."""
        self._kicked = False
        self.broken: Exception | None = None
        """Why nothing is scored any more."""

    @property
    def num_waiting(self) -> int:
        """The number of samples that no worker has."""
        return self._queue.num_samples

    def take_most_waiting(self) -> int:
        """The most samples that waited while every worker was busy, since the last call."""
        most, self._most_waiting = self._most_waiting, 0
        return most

    def score(self, requests: Sequence[ScoreRequest]) -> PendingScores:
        pending = PendingScores(requests)
        if self.broken is not None:
            pending.set_exception(self.broken)
        elif not requests:
            pending.set_result([])
        else:
            self._queue.put(pending)
            if len(self._queue) > len(self._idle):
                self._most_waiting = max(self._most_waiting, self.num_waiting)
            self._kick()
        return pending

    def free(self, worker: S) -> None:
        """Hand work to an idle worker."""
        self._idle.append(worker)
        self.hand_out()

    def withdraw(self, worker: S) -> bool:
        """Take an idle worker off the list of those that get work; False if it is busy."""
        if worker not in self._idle:
            return False
        self._idle.remove(worker)
        return True

    def fail(self, error: Exception) -> None:
        """End the dispatch: calls that wait fail with this error, later ones with the first such error."""
        self.broken = self.broken or error
        self._queue.fail(error)

    def close(self, error: Exception) -> None:
        """As `fail`, also for the calls that workers hold."""
        for worker in self._workers.values():
            self._queue.put_back(worker.batch)
        self.fail(error)

    def _kick(self) -> None:
        """Hand out work in the next turn of the event loop, when everything that is submitted during this one has arrived."""
        if self._idle and not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self.hand_out)

    def hand_out(self) -> None:
        self._kicked = False
        while self._idle and self._queue:
            if batch := self._queue.take(len(self._workers)):
                self._call(self._idle.popleft(), batch)

    def _call(self, worker: S, batch: list[PendingScores]) -> None:
        worker.batch = batch
        num_samples = sum(pending.num_samples for pending in batch)
        worker.due = asyncio.get_running_loop().time() + self._limit_s(num_samples)
        worker.activity.enter("scoring")
        try:
            answer = worker.score([pending.requests for pending in batch])
        except Exception as e:
            self._failed(worker, e)
        else:
            answer.add_done_callback(partial(self._answered, worker))

    def _answered(self, worker: S, answer: asyncio.Future[list[list[Score]]]) -> None:
        try:
            results = answer.result()
        except (Exception, asyncio.CancelledError) as e:
            self._failed(worker, e)
            return
        for pending, scores in zip(self._end_call(worker), results, strict=True):
            if not pending.done():
                pending.set_result(scores)
        self._on_answered(worker)

    def _failed(self, worker: S, error: BaseException) -> None:
        batch = self._end_call(worker)
        self._queue.put_back(batch)
        self._on_failed(worker, error, batch)

    def _end_call(self, worker: S) -> list[PendingScores]:
        batch, worker.batch = worker.batch, []
        worker.due = math.inf
        worker.activity.enter(IDLE)
        return batch
