"""The life of a worker: one policy for rollout engines and reward workers; learner ranks and scoring processes share its patience.

    start -> alive -> died -> killed -> back-off -> start again -> ..         until it is given up
    join   the start of a worker while the others of its pool are busy
    leave  a worker gets nothing new, finishes what it has, and ends
    watch  a busy worker that does not answer a probe hangs, and its pool treats it as dead

A start that takes far longer than those before it (the worker hangs, or its node is gone and there is room nowhere) is begun again
with twice the time. A worker is given up when it has died too often without finishing anything in between, or when no worker of its
pool is alive and none has started for as long as a first start may take.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ray.exceptions import RayError

from actors.patience import Patience
from actors.runtime import Actors
from grpo_ray.activity import Activity
from grpo_ray.errors import DeadlineError, GrpoRayError, WorkerError
from grpo_ray.types import Track

START_WARNING_S = 60.0
"""Warn when a worker has not started after this many seconds."""
CANCEL_S = 5.0


@dataclass(eq=False, slots=True)
class Worker:
    """One place in a pool, through the lives of its actor."""

    index: int
    name: str
    handle: Any = None
    """The actor of its present life."""
    incarnation: int = 0
    """The number of its present life."""
    alive: bool = False
    started: bool = False
    """It has been alive."""
    leaving: bool = False
    restarts: int = 0
    """In a row, without anything finished in between."""
    probe: asyncio.Task[None] | None = None
    """Of its present life, the last one."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """They end with the worker, if not before."""
    activity: Activity = field(init=False)

    def __post_init__(self) -> None:
        self.activity = Activity(self.name)


W = TypeVar("W", bound=Worker)
W_contra = TypeVar("W_contra", bound=Worker, contravariant=True)


class WorkerKind(Protocol[W]):
    """What is special to one kind of worker."""

    max_restarts: int
    """Of one worker, in a row."""
    probe_s: float
    """A worker that does not answer a probe for so long hangs."""
    stop_s: float
    """A worker that does not stop by itself for so long is killed."""

    def make(self, index: int) -> W:
        """A place in the pool, without an actor."""
        ...

    def launch(self, worker: W) -> Any:
        """The handle of a new actor, at once."""
        ...

    async def ready(self, worker: W, limit_s: float) -> None:
        """Wait until the actor has started.

        Raises:
            DeadlineError: not within `limit_s`.
            WorkerError: it died.
            GrpoRayError: no other start would do better.
        """
        ...

    def waits_for(self) -> str:
        """What a worker that does not start may be busy with, or lack."""
        ...

    def backoff_s(self, worker: W, cause: BaseException) -> float:
        """Before `worker.restarts` becomes one more start, after it died of `cause`."""
        ...

    def probe(self, handle: Any) -> Awaitable[Any]:
        """A call that a worker which does not hang answers at any time."""
        ...

    def stop(self, handle: Any) -> Awaitable[Any]:
        """Let the actor end of its own accord."""
        ...


class Pool(Protocol[W_contra]):
    """What the supervisor tells the pool whose workers it holds."""

    on_trouble: Callable[[str], None]

    def is_busy(self, worker: W_contra) -> bool:
        """It has work that it may hang over."""
        ...

    def worker_started(self, worker: W_contra) -> None:
        """It is alive, with nothing to do."""
        ...

    def worker_hangs(self, worker: W_contra, incarnation: int) -> None:
        """That life of it did not answer a probe in time."""
        ...

    def worker_restarts(self, worker: W_contra, cause: BaseException) -> None:
        """It is started again, after `cause`."""
        ...


class GivenUpError(GrpoRayError):
    """A worker that is not started again."""

    def __init__(self, worker: str, cause: BaseException, *, late: bool) -> None:
        super().__init__(f"{worker} is given up: {cause}")
        self.cause = cause
        """What its last life, or its last start, ended with."""
        self.late = late
        """No worker of the pool has started in time; else it died too often."""


class Supervisor(Generic[W]):
    """The workers of one pool, by index. All methods belong to the event loop of the pool."""

    def __init__(self, kind: WorkerKind[W], pool: Pool[W], source: Actors, number: int, limit_s: float) -> None:
        """`limit_s`: what the first start of a worker may take."""
        self._kind = kind
        self._pool = pool
        self._source = source
        self._patience = Patience(limit_s, lambda: asyncio.get_running_loop().time())
        self._lives = itertools.count()
        """No two lives of a name have the same number, whoever had the name before."""
        self.workers = {i: kind.make(i) for i in range(number)}
        self._left: list[W] = []
        """They are gone, and have something to report yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self.num_restarts = 0

    @property
    def limit_s(self) -> float:
        return self._patience.limit_s

    @property
    def num_alive(self) -> int:
        return sum(w.alive for w in self.workers.values())

    # Starts

    async def start_all(self) -> None:
        """Start every worker, side by side; the first error ends them all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in self.workers.values():
                    tasks.create_task(self._start(worker, self.limit_s))
        except BaseExceptionGroup as group:
            error = group.exceptions[0]
            raise error from error.__cause__

    async def join(self, worker: W, tries: int = 1) -> None:
        """Start a new worker while the others are busy. Raises the error of its last try; see `WorkerKind.ready`."""
        for left in reversed(range(tries)):
            try:
                await self._start_with_warning(worker, self.limit_s)
                return
            except (WorkerError, DeadlineError) as e:
                self.kill(worker)
                if not left:
                    raise
                self._pool.on_trouble(f"{worker.name} was to join and does not start, it is tried again: {e}")

    async def restart(self, worker: W, cause: BaseException) -> bool:
        """Start a worker again that died of `cause`, until it is alive (True) or is to leave (False).

        Raises:
            GivenUpError: see the top of this file.
            GrpoRayError: no other start would do better.
        """
        self._patience.died()
        limit_s = self._patience.again_s
        while worker.restarts < self._kind.max_restarts and not worker.leaving:
            worker.restarts += 1
            self.num_restarts += 1
            self._pool.worker_restarts(worker, cause)
            await asyncio.sleep(self._kind.backoff_s(worker, cause))
            try:
                await self._start_with_warning(
                    worker, limit_s if self.num_alive else min(limit_s, self._patience.left_s)
                )
                return True
            except WorkerError as e:
                cause = e
                self.kill(worker)
                self._patience.died()
            except DeadlineError as e:
                cause = e
                self.kill(worker)
                if self._patience.left_s <= 0 and not self.num_alive:
                    raise GivenUpError(worker.name, cause, late=True) from None
                worker.restarts -= 1  # It died of nothing.
                limit_s = self._patience.doubled(limit_s)
        if worker.leaving:
            return False
        raise GivenUpError(worker.name, cause, late=False)

    async def _start_with_warning(self, worker: W, limit_s: float) -> None:
        """A start while the run goes on: the cluster may have no room any more, and Ray does not report that."""
        warning = asyncio.get_running_loop().call_later(
            START_WARNING_S,
            self._pool.on_trouble,
            f"{worker.name} has not started for {START_WARNING_S:g} s: {self._kind.waits_for()}",
        )
        try:
            await self._start(worker, limit_s)
        finally:
            warning.cancel()

    async def _start(self, worker: W, limit_s: float) -> None:
        with self._patience.measured():
            worker.incarnation = next(self._lives)
            worker.handle = self._kind.launch(worker)
            worker.probe = None
            await self._kind.ready(worker, limit_s)
        worker.alive = worker.started = True
        self._pool.worker_started(worker)

    # Members

    def scale(self, number: int, worth: Callable[[W], Any]) -> tuple[list[W], list[W]]:
        """Change the number of workers that are not to leave.

        Returns:
            Those that are new, without an actor; and those that are to leave from now on, which are worth least.
        """
        staying = [w for w in self.workers.values() if not w.leaving]
        free = (i for i in itertools.count() if i not in self.workers)
        new = [self._kind.make(next(free)) for _ in range(number - len(staying))]
        self.workers |= {w.index: w for w in new}
        leaving = sorted(staying, key=worth)[: max(0, len(staying) - number)]
        for worker in leaving:
            worker.leaving = True
        return new, leaving

    def remove(self, worker: W) -> None:
        """A worker that has nothing to do any more is no member from now on, and ends."""
        del self.workers[worker.index]
        if worker.started:
            self._left.append(worker)
        _cancel(worker.tasks)
        worker.alive = False
        _hold(self._ending, asyncio.create_task(self._end(worker)))

    def kill(self, worker: W) -> None:
        """At once, whatever it is doing."""
        if worker.handle is not None:
            self._source.kill(worker.handle)

    async def close(self) -> None:
        """Cancel what is under way, and end all workers."""
        workers = list(self.workers.values())
        tasks = _cancel({*self._tasks, *(t for w in workers for t in w.tasks)})
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_S)
        await asyncio.gather(*(self._end(w) for w in workers), *self._ending)

    async def _end(self, worker: W) -> None:
        """Of its own accord, or by force."""
        worker.alive = False
        handle, worker.handle = worker.handle, None
        if handle is None:
            return
        try:
            async with asyncio.timeout(self._kind.stop_s):
                await self._kind.stop(handle)
        except (RayError, GrpoRayError, TimeoutError):
            pass
        finally:
            self._source.kill(handle)

    # Tasks

    def keep(self, worker: W, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the worker, if not before."""
        return _hold(worker.tasks, asyncio.create_task(work))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that ends with the pool, if not before."""
        return _hold(self._tasks, asyncio.create_task(work))

    async def watch(self, period_s: Callable[[], float]) -> None:
        """Probe the workers that are busy, every `period_s()`."""
        while True:
            await asyncio.sleep(period_s())
            for worker in list(self.workers.values()):
                if worker.alive and self._pool.is_busy(worker) and (worker.probe is None or worker.probe.done()):
                    worker.probe = self.keep(worker, self._probe(worker))

    async def _probe(self, worker: W) -> None:
        life = worker.incarnation
        try:
            async with asyncio.timeout(self._kind.probe_s):
                await self._kind.probe(worker.handle)
        except TimeoutError:
            self._pool.worker_hangs(worker, life)
        except (RayError, GrpoRayError):
            pass  # It is dead, and the call that it is busy with says what it died of.

    # Reports

    def reporting(self) -> list[W]:
        """The workers that have something to report: not those that are only about to join."""
        return [*(w for w in self.workers.values() if w.started), *self._left]

    def take_tracks(self) -> list[Track]:
        """What each worker did since the last call."""
        tracks = [worker.activity.take() for worker in self.reporting()]
        self._left = []
        return tracks


def _hold(tasks: set[asyncio.Task[None]], task: asyncio.Task[None]) -> asyncio.Task[None]:
    """The event loop itself holds a task by a weak reference."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _cancel(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """All but the one that asks for it."""
    others = tasks - {asyncio.current_task()}
    for task in others:
        task.cancel()
    return others
