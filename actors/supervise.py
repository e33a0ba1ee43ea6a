"""The life of a worker: one policy for rollout engines and reward workers; learner ranks and scoring processes share its timeout.

    start -> alive -> died -> killed -> back-off -> start again -> ..         until it is given up
    join   the start of a worker while the others of its pool are busy
    leave  a worker gets nothing new, finishes what it has, and ends
    watch  a busy worker that does not answer a probe hangs, and its pool treats it as dead

A start that takes far longer than those before it (the worker hangs, or its node is gone and there is room nowhere) is retried
with twice the time. A worker is given up when it has died too often without finishing anything in between, or when no worker of its
pool is alive and none has started for as long as a first start may take.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ray.exceptions import RayError

from actors.runtime import Actors
from actors.start_timeout import StartTimeout
from grpo_ray.errors import DeadlineError, GrpoRayError, WorkerError
from grpo_ray.telemetry.activity import Activity
from grpo_ray.types import Track

START_WARNING_S = 60.0
"""Warn when a worker has not started after this many seconds."""
CANCEL_S = 5.0


@dataclass(eq=False, slots=True)
class Worker:
    """One slot of a pool; it outlives the actors that fill it, one after the other."""

    index: int
    name: str
    handle: Any = None
    """The Ray handle of the present actor."""
    incarnation: int = 0
    """The number of the present actor: a worker that was restarted is another incarnation."""
    alive: bool = False
    started: bool = False
    """Whether any actor of this slot has been alive."""
    leaving: bool = False
    restarts: int = 0
    """The number of restarts in a row, without any work finished in between."""
    probe: asyncio.Task[None] | None = None
    """The latest probe of the present actor."""
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """The tasks that are cancelled when the worker leaves."""
    activity: Activity = field(init=False)

    def __post_init__(self) -> None:
        self.activity = Activity(self.name)


W = TypeVar("W", bound=Worker)
W_contra = TypeVar("W_contra", bound=Worker, contravariant=True)


class WorkerKind(Protocol[W]):
    """What differs between kinds of workers: how one is started, probed and stopped."""

    max_restarts: int
    """A worker that has been restarted this many times in a row is given up."""
    probe_s: float
    """A worker that does not answer a probe within this many seconds hangs."""
    stop_s: float
    """A worker that does not stop by itself within this many seconds is killed."""

    def make(self, index: int) -> W:
        """Create a worker without an actor."""
        ...

    def launch(self, worker: W) -> Any:
        """Create an actor and return its handle without waiting for it."""
        ...

    async def ready(self, worker: W, limit_s: float) -> None:
        """Wait until the actor has started.

        Raises:
            DeadlineError: it has not started within `limit_s`.
            WorkerError: it died.
            GrpoRayError: another start would not help.
        """
        ...

    def waits_for(self) -> str:
        """What a worker that does not start may be busy with, or lack."""
        ...

    def backoff_s(self, worker: W, cause: BaseException) -> float:
        """The seconds to wait before restart number `worker.restarts` of a worker that died of `cause`."""
        ...

    def probe(self, handle: Any) -> Awaitable[Any]:
        """Make a call that a worker answers at any time, unless it hangs."""
        ...

    def stop(self, handle: Any) -> Awaitable[Any]:
        """Ask the actor to end of its own accord."""
        ...


class Pool(Protocol[W_contra]):
    """The pool, as the supervisor of its workers sees it."""

    on_trouble: Callable[[str], None]

    def is_busy(self, worker: W_contra) -> bool:
        """Whether the worker has work that it may hang over."""
        ...

    def worker_started(self, worker: W_contra) -> None:
        """Handle a worker that is alive now, and idle."""
        ...

    def worker_hangs(self, worker: W_contra, incarnation: int) -> None:
        """Handle an incarnation of the worker that did not answer a probe in time."""
        ...

    def worker_restarts(self, worker: W_contra, cause: BaseException) -> None:
        """Handle a worker that died of `cause` and is about to be restarted."""
        ...


class GivenUpError(GrpoRayError):
    """A worker that is not restarted."""

    def __init__(self, worker: str, cause: BaseException, *, late: bool) -> None:
        super().__init__(f"{worker} is given up: {cause}")
        self.cause = cause
        """The error that its last actor, or the last start, ended with."""
        self.late = late
        """Whether no worker of the pool has started in time; otherwise the worker died too often."""


class Supervisor(Generic[W]):
    """Keeps the workers of one pool alive. All methods belong to the event loop of the pool."""

    def __init__(self, kind: WorkerKind[W], pool: Pool[W], source: Actors, number: int, limit_s: float) -> None:
        """`limit_s` is what the first start of a worker may take."""
        self._kind = kind
        self._pool = pool
        self._source = source
        self._start_timeout = StartTimeout(limit_s, lambda: asyncio.get_running_loop().time())
        self._lives = itertools.count()
        """The numbers of lives: no two lives of a name have the same one, whichever worker had the name before."""
        self.workers = {i: kind.make(i) for i in range(number)}
        self._left: list[W] = []
        """The workers that have left and still have something to report."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self.num_restarts = 0
        self.turn: Callable[[], AbstractAsyncContextManager[bool | None]] = nullcontext
        """The turn in which a worker restarts, where others have its device meanwhile; True inside: it had to wait."""

    @property
    def limit_s(self) -> float:
        return self._start_timeout.limit_s

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
        """Start a new worker while the others are busy, and raise the error of the last try; see `WorkerKind.ready`."""
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
        """Restart a worker that died of `cause`, until it is alive (True) or is to leave (False).

        Raises:
            GivenUpError: see the top of this file.
            GrpoRayError: another start would not help.
        """
        self._start_timeout.died()
        limit_s = self._start_timeout.again_s
        while worker.restarts < self._kind.max_restarts and not worker.leaving:
            worker.restarts += 1
            self.num_restarts += 1
            self._pool.worker_restarts(worker, cause)
            await asyncio.sleep(self._kind.backoff_s(worker, cause))
            try:
                async with self.turn() as waited:
                    if waited:
                        self._start_timeout.died()
                    await self._start_with_warning(
                        worker, limit_s if self.num_alive else min(limit_s, self._start_timeout.left_s)
                    )
                return True
            except WorkerError as e:
                cause = e
                self.kill(worker)
                self._start_timeout.died()
            except DeadlineError as e:
                cause = e
                self.kill(worker)
                if self._start_timeout.left_s <= 0 and not self.num_alive:
                    raise GivenUpError(worker.name, cause, late=True) from None
                worker.restarts -= 1  # It has not died.
                limit_s = self._start_timeout.doubled(limit_s)
        if worker.leaving:
            return False
        raise GivenUpError(worker.name, cause, late=False)

    async def _start_with_warning(self, worker: W, limit_s: float) -> None:
        """Start a worker while the run goes on: the cluster may have no room any more, and Ray does not report that."""
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
        with self._start_timeout.measured():
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
            The new workers, without an actor; and those that are to leave from now on, which are worth least.
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
        """End an idle worker, which is not a member of the pool from now on."""
        del self.workers[worker.index]
        if worker.started:
            self._left.append(worker)
        _cancel(worker.tasks)
        worker.alive = False
        _hold(self._ending, asyncio.create_task(self._end(worker)))

    def kill(self, worker: W) -> None:
        """End the worker's actor at once, whatever it is doing."""
        if worker.handle is not None:
            self._source.kill(worker.handle)

    async def close(self) -> None:
        """Cancel all tasks and end all workers."""
        workers = list(self.workers.values())
        tasks = _cancel({*self._tasks, *(t for w in workers for t in w.tasks)})
        if tasks:
            await asyncio.wait(tasks, timeout=CANCEL_S)
        await asyncio.gather(*(self._end(w) for w in workers), *self._ending)

    async def _end(self, worker: W) -> None:
        """End the worker's actor, of its own accord or by force."""
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
        """Run a task that is cancelled when the worker leaves."""
        return _hold(worker.tasks, asyncio.create_task(work))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a task that is cancelled when the pool closes."""
        return _hold(self._tasks, asyncio.create_task(work))

    async def watch(self, period_s: Callable[[], float]) -> None:
        """Probe the busy workers, every `period_s()`."""
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
            pass  # It is dead, and the call that it is busy with reports what it died of.

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
    """Keep a reference to the task while it runs: the event loop has only a weak one."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _cancel(tasks: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    """Cancel all tasks but the current one, and return them."""
    others = tasks - {asyncio.current_task()}
    for task in others:
        task.cancel()
    return others
