"""Requested samples on their way to rollout engines and back.

    add -> queue -> least loaded usable engine -> submit .. settle -> the sample
             ^                                      |
             +------- take_back: the engine died ---+

It knows engines only by what they hold and by `submit` and `cancel`; the pool starts and polls them and detects their deaths.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from actors.rollout.balance import BalancedEngine, EngineBalance
from actors.rollout.poison import is_suspect
from grpo_ray.errors import DataError, DeadlineError, PoisonedError, WorkerError
from grpo_ray.loop.immediate_future import ImmediateFuture
from grpo_ray.types import SampleInfo, SampleRequest

if TYPE_CHECKING:
    from actors.rollout.actor import Outcome

QUEUE_FACTOR = 1.25
"""The requests of an engine, as a multiple of those that it samples at once: the next ones are there when a slot gets free."""
MAX_ABORTS = 3


class PendingSample(ImmediateFuture[SampleInfo]):
    """One requested sample. Cancelling it frees its slot in the engine."""

    __slots__ = ("_queue", "aborts", "deaths", "engine", "lone_deaths", "number", "request", "since")

    def __init__(self, queue: RequestQueue, number: int, request: SampleRequest, since: float) -> None:
        super().__init__()
        self._queue = queue
        self.number = number
        self.request = request
        self.since = since
        """When the request was last handed to an engine, or queued."""
        self.deaths = self.lone_deaths = 0
        """See `poison.Suspect`."""
        self.aborts = 0
        self.engine: SamplingEngine | None = None
        """The engine that works on the sample."""

    def succeed(self, info: SampleInfo) -> None:
        self._queue._forget(self)
        self.set_result(info)

    def fail(self, error: Exception) -> None:
        if not self.done():
            self._queue._forget(self)
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:
        if self.done():
            return False
        self._queue._forget(self)
        return super().cancel(msg)

    @property
    def prompt_id(self) -> str:
        return self.request.prompt_id

    @property
    def name(self) -> str:
        return f"sample {self.request.index} of prompt {self.request.prompt_id}"


class SamplingEngine(BalancedEngine, Protocol):
    """An engine, as the queue sees it."""

    name: str
    work: dict[int, PendingSample]
    """The engine's samples by number, in the order in which it got them."""

    def submit(self, requests: list[tuple[int, SampleRequest]]) -> None:
        """Begin these samples; how each ends is reported to `RequestQueue.settle`."""
        ...

    def cancel(self, number: int) -> None: ...

    def has_finished(self, info: SampleInfo) -> None:
        """Count a finished sample of the engine."""
        ...

    def show(self) -> None:
        """Record that the engine's work has changed."""
        ...

    def state(self, version: int) -> str:
        """Why the engine takes no request, as the sentence continues after its name; `version` is the current one."""
        ...


class RequestQueue:
    """Hands requests to engines and settles what comes back. All methods belong to one event loop."""

    def __init__(
        self,
        engines: Mapping[int, SamplingEngine],
        max_num_seqs: int,
        *,
        on_leaving_idle: Callable[[Any], None],
        on_stale: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            engines: the engines by index.
            max_num_seqs: the samples that an engine runs at once.
            on_leaving_idle: called with an engine that is to leave and has finished its work.
            on_stale: called when samples wait while live engines hold old weights.
        """
        self._engines = engines
        self._max_num_seqs = max_num_seqs
        self._capacity = int(max_num_seqs * QUEUE_FACTOR)
        self._on_leaving_idle = on_leaving_idle
        self._on_stale = on_stale
        self._balance = EngineBalance(engines)
        self._pending: set[PendingSample] = set()
        self._queue: deque[PendingSample] = deque()
        self._numbers = itertools.count()
        self._dispatching = False
        self._clock = clock
        self._progress = clock()
        """When a sample was last finished."""
        self._most_waiting = 0
        self._closed = False

    def __iter__(self) -> Iterator[PendingSample]:
        """Iterate over the unfinished samples."""
        return iter(list(self._pending))

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def num_queued(self) -> int:
        """The number of samples that no engine has."""
        return len(self._queue)

    @property
    def version(self) -> int:
        """The version of the weights that usable engines hold."""
        return self._balance.version

    @property
    def any_stale(self) -> bool:
        return bool(self._balance.stale)

    def add(self, request: SampleRequest) -> PendingSample:
        sample = PendingSample(self, next(self._numbers), request, self._clock())
        self._pending.add(sample)
        if self._closed:
            sample.fail(WorkerError("the rollout pool is closed"))
        else:
            self._queue.append(sample)
            self.kick()
        return sample

    def take_most_waiting(self) -> int:
        """The most samples beyond what the engines sample at once, since the last call."""
        most, self._most_waiting = self._most_waiting, 0
        return most

    def use_version(self, version: int) -> None:
        """Use engines with these weights from now on, and no others."""
        self._balance.use_version(version)
        self.kick()

    def engine_changed(self, engine: SamplingEngine) -> None:
        """Record that an engine started, was removed, or is to leave."""
        self._balance.reconsider(engine)
        self.kick()

    # To an engine

    def kick(self) -> None:
        """Dispatch once at the end of this turn of the event loop, so that requests made together travel together."""
        if not self._dispatching and (self._queue or self._balance.stale):
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        self._most_waiting = max(self._most_waiting, len(self) - len(self._engines) * self._max_num_seqs)
        self._balance.catch_up()
        for engine, samples in self._assign().items():
            engine.show()
            # If the engine dies of it, or before it, its poll reports that.
            engine.submit([(s.number, s.request) for s in samples])
        if self._pending and self._balance.stale:
            self._on_stale()

    def _assign(self) -> dict[SamplingEngine, list[PendingSample]]:
        """For each engine, what it gets of the queue: as much as it has slots for."""
        given: dict[SamplingEngine, list[PendingSample]] = {}
        held: list[PendingSample] = []
        now = self._clock()
        while self._queue:
            sample = self._queue[0]
            suspect = is_suspect(sample)
            engine = self._balance.least_loaded(below=1 if suspect else self._capacity)
            if engine is None and not suspect:
                break
            self._queue.popleft()
            if sample.done():
                continue
            if engine is None:
                held.append(sample)
                continue
            sample.since = now
            sample.engine = engine
            engine.work[sample.number] = sample
            self._balance.reconsider(engine)
            given.setdefault(engine, []).append(sample)
        self._queue.extendleft(reversed(held))
        return given

    # Back from it

    def settle(self, engine: SamplingEngine, outcomes: Sequence[Outcome], samples_ref: Any) -> None:
        """Settle what one poll returned; the samples are behind `samples_ref`."""
        for outcome in outcomes:
            sample = engine.work.pop(outcome.ticket, None)
            if sample is None or sample.done():
                continue
            sample.engine = None
            if outcome.info is not None:
                engine.has_finished(outcome.info)
                self._progress = self._clock()
                sample.succeed(_behind(outcome.info, samples_ref))
            elif outcome.problem == "refused":
                sample.fail(DataError(f"{engine.name} refuses {sample.name}: {outcome.detail}"))
            else:
                self._try_again(sample, engine, outcome.detail)
        self._has_less(engine)
        self.kick()

    def take_back(self, engine: SamplingEngine) -> list[PendingSample]:
        """The unfinished samples of an engine that died."""
        work = [sample for sample in engine.work.values() if not sample.done()]
        engine.work.clear()
        for sample in work:
            sample.engine = None
        self._balance.reconsider(engine)
        return work

    def requeue(self, samples: Sequence[PendingSample]) -> None:
        """Queue samples before all others."""
        waiting = [sample for sample in samples if not sample.done()]
        for sample in waiting:
            sample.since = self._clock()
        self._queue.extendleft(reversed(waiting))
        self.kick()

    def _try_again(self, sample: PendingSample, engine: SamplingEngine, reason: str) -> None:
        """Queue a request that the engine ended without a sample, or fail it after MAX_ABORTS."""
        sample.aborts += 1
        if sample.aborts >= MAX_ABORTS:
            told = f"{sample.name} ended {sample.aborts} times without a sample, last on {engine.name}: {reason}"
            sample.fail(WorkerError(told))
        else:
            self.requeue([sample])

    def _has_less(self, engine: SamplingEngine) -> None:
        """Record that an engine has less work than before."""
        self._balance.reconsider_later(engine)
        engine.show()
        if engine.leaving and not engine.work:
            self._on_leaving_idle(engine)

    # Ends without a sample

    def _forget(self, sample: PendingSample) -> None:
        """Drop a sample that ends: nobody waits for it, so an engine that still has it stops."""
        self._pending.remove(sample)
        if (engine := sample.engine) is not None:
            del engine.work[sample.number]
            sample.engine = None
            self._has_less(engine)
            engine.cancel(sample.number)
            self.kick()

    def fail_all(self, why: str) -> None:
        for sample in self:
            sample.fail(WorkerError(why))

    def fail_poisoned(self, prompt_id: str, why: str) -> None:
        """Fail all samples of a poisoned prompt."""
        for sample in self:
            if sample.prompt_id == prompt_id:
                sample.fail(PoisonedError(why))

    def fail_late(self, limit_s: float) -> None:
        """Enforce the deadline of every sample: from the moment an engine got it; while queued, from the last progress of any."""
        now = self._clock()
        for engine in list(self._engines.values()):
            for sample in _handed_before(now - limit_s, engine):
                what = f"{engine.name} did not finish {sample.name} within {limit_s:g} s (deadlines.sample_s)"
                sample.fail(DeadlineError(what))
        for sample in list(self._queue) if now - self._progress > limit_s else ():
            if now - sample.since > limit_s and not sample.done():
                states = ", ".join(f"{e.name} {e.state(self.version)}" for e in self._engines.values())
                what = f"no engine took {sample.name} for {limit_s:g} s (deadlines.sample_s): {states}"
                sample.fail(DeadlineError(what))

    def close(self) -> None:
        """Fail unfinished samples, and later requests."""
        self._closed = True
        for sample in self:
            sample.engine = None
            sample.fail(WorkerError("the rollout pool was closed"))


def _handed_before(when: float, engine: SamplingEngine) -> list[PendingSample]:
    """The samples that the engine has had since before `when`."""
    return list(itertools.takewhile(lambda sample: sample.since < when, engine.work.values()))


def _behind(info: SampleInfo, ref: Any) -> SampleInfo:
    """The same record with the handle, which the rollout engine cannot know."""
    return SampleInfo(
        info.prompt_id,
        info.index,
        info.num_prompt_tokens,
        info.num_tokens,
        info.min_version,
        info.finish_reason,
        info.worker,
        ref,
        info.row,
        info.num_environment_tokens,
        info.episode,
    )
