"""All rollout engines as one `roles.Sampler`: chooses the engine, moves work when one dies, restarts it.

    generate -> queue -> least loaded usable engine -> submit ... poll -> future
                  ^                                      |
                  +---------- the engine died -----------+

An engine is usable while it is alive and holds the current policy version. A restarted one loads the first weights and is stale
until a weight sync has reached it; `on_stale` asks for one when samples wait.

`scale` changes the number of engines at any time. One that joins is like a restarted one. One that leaves gets nothing new,
finishes what it has, and then ends; if it dies before, its work moves to the others as ever.

A prompt may be what ends engines, and then it would end all of them. So what an engine worked on when it died (unless its whole
node did) is tried again on other engines; what was at SHARED_DEATHS deaths, or at one as the only prompt of its engine, alone on
one. A prompt is poisoned, and all its samples fail, when POISONED_DEATHS engines died that worked on nothing else. Deaths among
others, however many, only make it suspect: an innocent prompt with long answers is at many, where machines fail or another prompt
is poisoned.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from ray.exceptions import RayError

from actors.cluster import demands, gpus_per_engine, placed
from actors.deaths import KernelKills, fate, is_blameless, kind_of
from actors.engine_adapters import AdapterOptions
from actors.rollout import Outcome, RolloutActor
from actors.rollout_vllm_options import rollout_env
from actors.runtime import Actors, RayActors, again_within, core_error, log_tail, node_died, start_named, within
from actors.weights import EngineTarget, resolve_backend
from grpo_ray.activity import IDLE, Activity
from grpo_ray.answers import Answer
from grpo_ray.config import RunConfig
from grpo_ray.errors import DataError, DeadlineError, GrpoRayError, PoisonedError, WorkerError
from grpo_ray.machine import usable_cpus
from grpo_ray.types import SampleInfo, SampleRequest, Track

POLL_S = 10.0
POLLS_PER_S = 10.0
"""Of a large pool, which asks engines with nothing to tell less often."""
POLL_SLACK_S = 60.0
"""An actor whose poll is this much late is taken for dead."""
QUEUE_FACTOR = 1.25
"""Requests at an engine over what it samples at once: the next ones are there when a place gets free."""
MAX_RESTARTS = 3
"""Of one engine, without a finished sample in between."""
BACKOFF_S = 1.0
LATE_S = 60.0
"""A start that takes longer is told of."""
SHARED_DEATHS = 2
POISONED_DEATHS = 2
"""See the top of this file."""
MAX_ABORTS = 3
CLOSE_S = 5.0
MAX_ENGINES = 1 << 20
"""More than any pool has."""


class _Ticket(Answer[SampleInfo]):
    """One sample that was asked for, and its answer. Cancelling it frees its place in the engine."""

    __slots__ = ("_pool", "aborts", "deaths", "engine", "lone_deaths", "number", "request", "since")

    def __init__(self, pool: RolloutPool, number: int, request: SampleRequest) -> None:
        super().__init__()
        self._pool = pool
        self.number = number
        self.request = request
        self.since = time.monotonic()
        """When it was last handed to an engine, or queued."""
        self.deaths = 0
        """Of engines that worked on it."""
        self.lone_deaths = 0
        """Those of engines that worked on nothing else but its prompt."""
        self.aborts = 0
        self.engine: _Engine | None = None
        """That works on it."""

    def succeed(self, info: SampleInfo) -> None:
        self._pool._forget(self)
        self.set_result(info)

    def fail(self, error: Exception) -> None:
        if not self.done():
            self._pool._forget(self)
            self.set_exception(error)

    def cancel(self, msg: Any | None = None) -> bool:
        if self.done():
            return False
        self._pool._forget(self)
        return super().cancel(msg)

    @property
    def name(self) -> str:
        return f"sample {self.request.index} of prompt {self.request.prompt_id}"

    @property
    def is_suspect(self) -> bool:
        """It may be what ends engines: it is tried alone on one."""
        return self.deaths >= SHARED_DEATHS or self.lone_deaths > 0


@dataclass(eq=False, slots=True)
class _Engine:
    """One place in the pool, through the lives of its actor."""

    index: int
    name: str = field(init=False)
    incarnation: int = 0
    handle: Any = None
    pids: dict[str, int] = field(default_factory=dict)
    alive: bool = False
    silent_s: float = 0.0
    """Since it was last polled."""
    gone: str = ""
    """Why it is not restarted any more."""
    version: int | None = None
    """Of the weights it holds."""
    work: dict[int, _Ticket] = field(default_factory=dict)
    place: int | None = None
    """Its entry in `RolloutPool._usable`."""
    restarts: int = 0
    started: bool = False
    """It has been alive."""
    leaving: bool = False
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    samples: int = 0
    tokens: int = 0
    paused: bool = False
    """For a weight sync."""
    activity: Activity = field(init=False)
    told_busy_s: float = 0.0
    """Its busy seconds up to the last `take_stats`."""

    def __post_init__(self) -> None:
        self.name = f"rollout-{self.index}"
        self.activity = Activity(self.name)

    def show(self) -> None:
        """Tell its activity what it does now: after every change of `alive`, `paused` and `work`."""
        if not self.alive:
            self.activity.enter(IDLE if self.gone else "restarting")
        else:
            self.activity.enter("paused" if self.paused else "sampling" if self.work else IDLE)

    def handed_before(self, when: float) -> list[_Ticket]:
        """Its work that is older; the oldest stands first."""
        oldest = next(iter(self.work.values()), None)
        if oldest is None or oldest.since >= when:
            return []
        return list(itertools.takewhile(lambda t: t.since < when, self.work.values()))


class RolloutPool:
    """Make it with `RolloutPool.create`; all methods belong to the event loop that made it."""

    def __init__(
        self, config: RunConfig, model: str, run_dir: str, *, has_gpus: bool, actors: Actors, placement: Any = None
    ) -> None:
        self._config = config
        self._model = model
        self._run_dir = run_dir
        self._on_gpu = has_gpus
        self._placement = placement
        self._source = actors
        self._backend = resolve_backend(config, has_gpus=has_gpus)
        self._capacity = int(config.rollout.max_num_seqs * QUEUE_FACTOR)
        self._engines = {i: _Engine(i) for i in range(config.rollout.num_actors)}
        """By index."""
        self._by_name = {e.name: e for e in self._engines.values()}
        self._left: list[_Engine] = []
        """That have something to tell yet."""
        self._lives = itertools.count()
        """No two lives of a name have the same number, whoever had the name before."""
        self._usable: list[int] = []
        """Requests x MAX_ENGINES + index of each engine that may get more, sorted: a pool of a thousand is not searched for every
        sample."""
        self._moved: set[_Engine] = set()
        """That have less work than when they got their entries there: looked at when the next samples are handed out, which is less
        often."""
        self._stale: set[_Engine] = set()
        """Alive, with old weights."""
        self._tickets: set[_Ticket] = set()
        self._queue: deque[_Ticket] = deque()
        self._ids = itertools.count()
        self._dispatching = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._stale_sync: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._progress = time.monotonic()
        self._stats_since = time.monotonic()
        self._num_restarts = self._all_restarts = 0
        self._start_s = 0.0
        """The longest start so far."""
        self._died_at = 0.0
        """When an engine did, or its start, the last time."""
        self._most_waiting = 0
        self._closed = False
        self._kernel = KernelKills()
        self.membership = asyncio.Lock()
        """Held by a weight sync: meanwhile no engine leaves."""
        self.version = 0
        """What usable engines hold. Engines start with the model as it was given, which is version 0."""
        self.on_stale: Callable[[], Awaitable[None]] | None = None
        """Called when samples wait and there are engines alive with old weights."""
        self.lost_learner: Callable[[], str | None] = lambda: None
        """Why there is nobody left to get current weights from."""
        self.on_trouble: Callable[[str], None] = partial(print, "rollout:", flush=True)
        """Told what went wrong and is being mended."""

    @classmethod
    async def create(
        cls,
        config: RunConfig,
        model: str,
        run_dir: str,
        *,
        has_gpus: bool,
        actors: Actors | None = None,
        placement: Any = None,
    ) -> Self:
        """Start all engines side by side.

        Args:
            placement: a placement group with a bundle for each engine, where it shares a GPU.

        Raises:
            WorkerError: an engine does not start; with the end of its log.
            DeadlineError: it takes longer than deadlines.start_s.
        """
        pool = cls(config, model, run_dir, has_gpus=has_gpus, actors=actors or RayActors(), placement=placement)
        try:
            async with asyncio.TaskGroup() as tasks:
                for engine in pool._engines.values():
                    tasks.create_task(pool._start(engine, config.deadlines.start_s))
        except BaseExceptionGroup as group:
            await pool.close()
            raise group.exceptions[0] from None
        except BaseException:
            await pool.close()
            raise
        pool._spawn(pool._watch())
        return pool

    @property
    def _poll_s(self) -> float:
        return max(POLL_S, len(self._engines) / POLLS_PER_S)

    @property
    def stages_weights(self) -> bool:
        """Engines take new weights in beside sampling, and pause only to load them."""
        return self._backend == "gloo"

    # Turns, where samplers and learners share their devices

    async def sleep(self) -> None:
        """Every engine frees its GPU, when its samples under way have ended."""
        await self._of_all("sleep", limit="sample_s")
        self.mark_paused(self.engines(), paused=True)

    async def wake(self, part: Literal["weights", "kv_cache"] | None = None) -> None:
        """Every engine takes its GPU back, or that part of it."""
        await self._of_all("wake", part, limit="sync_s")
        if part != "weights":
            self.mark_paused(self.engines(), paused=False)

    async def _of_all(self, method: str, *args: Any, limit: Literal["sample_s", "sync_s"]) -> None:
        """One that fails is given up, and restarted."""
        limit_s = getattr(self._config.deadlines, limit)

        async def ask(target: EngineTarget) -> None:
            try:
                call = getattr(target.handle, method).remote(*args)
                await within(_answer(call), limit_s, f"{method} of {target.name}", f"deadlines.{limit}")
            except (RayError, GrpoRayError) as e:
                self.engine_failed(target, f"it failed in {method}: {fate(e, target.name)}", blame_work=False)

        await asyncio.gather(*(ask(t) for t in self.engines()))

    # Sampling

    @property
    def num_unfinished(self) -> int:
        """Samples asked for and not there yet."""
        return len(self._tickets)

    def generate(self, request: SampleRequest) -> asyncio.Future[SampleInfo]:
        """Draw one sample. Cancelling it frees its place in the engine.

        Raises (the future):
            DataError: the engine refuses the prompt (too long, a token out of its vocabulary).
            DeadlineError: an engine works on it for longer than deadlines.sample_s.
            PoisonedError: it ends engines.
            WorkerError: no engine is left.
        """
        ticket = _Ticket(self, next(self._ids), request)
        self._tickets.add(ticket)
        if self._closed:
            ticket.fail(WorkerError("the rollout pool is closed"))
        else:
            self._queue.append(ticket)
            self._kick()
        return ticket

    def take_stats(self) -> dict[str, float]:
        """Since the last call: restarts, and for each engine its samples, tokens, seconds at work and their part of the time."""
        now = time.monotonic()
        elapsed = max(now - self._stats_since, 1e-9)
        out = {"restarts": float(self._num_restarts)}
        for engine in self._told():
            busy = engine.activity.busy_s - engine.told_busy_s
            out[f"rollout/{engine.index}/samples"] = float(engine.samples)
            out[f"rollout/{engine.index}/tokens"] = float(engine.tokens)
            out[f"rollout/{engine.index}/busy_s"] = busy
            out[f"rollout/{engine.index}/busy"] = min(1.0, busy / elapsed)
            engine.samples, engine.tokens, engine.told_busy_s = 0, 0, engine.told_busy_s + busy
        self._stats_since, self._num_restarts = now, 0
        return out

    def take_most_waiting(self) -> int:
        """Samples beyond what the engines sample at once, at most, since the last call."""
        most, self._most_waiting = self._most_waiting, 0
        return most

    def live(self) -> dict[str, float]:
        """At this moment."""
        return {
            "queue/rollout": float(len(self._queue)),
            "under_way/rollout": float(sum(len(e.work) for e in self._engines.values())),
            "alive/rollout": float(sum(e.alive for e in self._engines.values())),
            "restarts/rollout": float(self._all_restarts),
        }

    def take_tracks(self) -> list[Track]:
        """Since the last call, of each engine: `sampling` (it has a request, and is not paused), `paused`, `restarting`."""
        tracks = [engine.activity.take() for engine in self._told()]
        self._left = []
        return tracks

    def _told(self) -> list[_Engine]:
        """Those that something is told of: not those that are only about to join."""
        return [*(e for e in self._engines.values() if e.started), *self._left]

    def _kick(self) -> None:
        """Dispatch once at the end of this turn of the event loop, so that requests made together travel together."""
        if not self._dispatching and (self._queue or self._stale):
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        places = len(self._engines) * self._config.rollout.max_num_seqs
        self._most_waiting = max(self._most_waiting, len(self._tickets) - places)
        outboxes: dict[_Engine, list[_Ticket]] = {}
        held: list[_Ticket] = []
        moved, self._moved = self._moved, set()
        for less_busy in moved:
            self._reconsider(less_busy)
        now = time.monotonic()
        while self._queue:
            ticket = self._queue[0]
            engine = self._place(ticket)
            if engine is None and not ticket.is_suspect:
                break
            self._queue.popleft()
            if ticket.done():
                continue
            if engine is None:
                held.append(ticket)
                continue
            ticket.since = now
            ticket.engine = engine
            engine.work[ticket.number] = ticket
            self._reconsider(engine)
            outboxes.setdefault(engine, []).append(ticket)
        self._queue.extendleft(reversed(held))
        for engine, tickets in outboxes.items():
            engine.show()
            # If the engine dies of it, or before it, its poll says so.
            engine.handle.submit.remote([(t.number, t.request) for t in tickets])
        if self._tickets and self._stale:
            self._ask_for_sync()

    def _place(self, ticket: _Ticket) -> _Engine | None:
        """The least loaded usable engine with room; of several the first."""
        if not self._usable:
            return None
        load, index = divmod(self._usable[0], MAX_ENGINES)
        return self._engines[index] if load < (1 if ticket.is_suspect else self._capacity) else None

    def _reconsider(self, engine: _Engine) -> None:
        """After anything that decides whether an engine gets work: its life, its weights, what it works on."""
        place = None
        self._stale.discard(engine)
        if engine.leaving or not engine.alive:
            pass
        elif engine.version != self.version:
            self._stale.add(engine)
        elif not (len(engine.work) == 1 and next(iter(engine.work.values())).is_suspect):
            place = len(engine.work) * MAX_ENGINES + engine.index
        if place == engine.place:
            return
        if engine.place is not None:
            del self._usable[bisect.bisect_left(self._usable, engine.place)]
        if place is not None:
            bisect.insort(self._usable, place)
        engine.place = place

    async def _poll(self, engine: _Engine, incarnation: int) -> None:
        """Until the engine dies; `_watch` holds its deadline."""
        poll = engine.handle.poll.options(num_returns=2)
        while engine.incarnation == incarnation and engine.alive and not self._closed:
            engine.silent_s = 0.0
            outcomes_ref, samples_ref = poll.remote(self._poll_s)
            try:
                outcomes = await outcomes_ref
            except (RayError, GrpoRayError) as e:
                # The other half of the answer holds the same error; left unread, Ray prints it on every screen.
                await asyncio.gather(asyncio.wait_for(_answer(samples_ref), 1.0), return_exceptions=True)
                self._died(
                    engine,
                    incarnation,
                    fate(e, engine.name, self._kernel),
                    blame_work=not (node_died(e) or is_blameless(e)),
                )
                return
            if outcomes:
                self._settle(engine, outcomes, samples_ref)

    async def _probe(self, engine: _Engine, incarnation: int) -> None:
        """Until the engine dies. Its actor answers polls also while the engine's core hangs, and then no sample would end."""
        limit_s = self._config.deadlines.sync_s
        while engine.incarnation == incarnation and engine.alive and not self._closed:
            await asyncio.sleep(self._poll_s)
            if not engine.work:
                continue
            try:
                await within(_answer(engine.handle.probe.remote()), limit_s, "a probe", "deadlines.sync_s")
            except DeadlineError:
                self._died(engine, incarnation, f"it hangs: no answer for {limit_s:g} s (deadlines.sync_s)")
            except (RayError, GrpoRayError):
                return  # Its poll says what it died of.

    def _settle(self, engine: _Engine, outcomes: Sequence[Outcome], samples_ref: Any) -> None:
        """What one poll brought."""
        for outcome in outcomes:
            ticket = engine.work.pop(outcome.ticket, None)
            if ticket is None or ticket.done():
                continue
            ticket.engine = None
            if outcome.info is not None:
                engine.samples += 1
                engine.tokens += outcome.info.num_tokens
                engine.restarts = 0
                self._progress = time.monotonic()
                ticket.succeed(outcome.info.behind(samples_ref))
            elif outcome.problem == "refused":
                ticket.fail(DataError(f"{engine.name} refuses {ticket.name}: {outcome.detail}"))
            else:
                self._try_again(ticket, engine, outcome.detail)
        self._has_less(engine)
        self._kick()

    def _try_again(self, ticket: _Ticket, engine: _Engine, reason: str) -> None:
        """It ended without a sample."""
        ticket.aborts += 1
        if ticket.aborts >= MAX_ABORTS:
            told = f"{ticket.name} ended {ticket.aborts} times without a sample, last on {engine.name}: {reason}"
            ticket.fail(WorkerError(told))
        else:
            self._requeue([ticket])

    def _has_less(self, engine: _Engine) -> None:
        """It has less work than before."""
        self._moved.add(engine)
        engine.show()
        if engine.leaving and not engine.work:
            self._retire(engine)

    def _requeue(self, tickets: Sequence[_Ticket]) -> None:
        for ticket in tickets:
            ticket.since = time.monotonic()
        self._queue.extendleft(reversed(tickets))
        self._kick()

    def _forget(self, ticket: _Ticket) -> None:
        """A ticket that ends. Nobody waits for it any more: the work on it, if an engine still has it, stops."""
        self._tickets.remove(ticket)
        if (engine := ticket.engine) is not None:
            del engine.work[ticket.number]
            ticket.engine = None
            self._has_less(engine)
            engine.handle.cancel.remote([ticket.number])
            self._kick()

    # Weights

    def engines(self, *, stale_only: bool = False) -> list[EngineTarget]:
        """The engines that are alive."""
        size = self._config.rollout.tensor_parallel_size
        return [
            EngineTarget(e.name, e.incarnation, e.handle, size)
            for e in self._engines.values()
            if e.alive and not (stale_only and (e.leaving or e.version == self.version))
        ]

    async def wait_for_engines(self) -> list[EngineTarget]:
        """The engines that are alive; waits for a restart under way while there is none.

        Raises:
            WorkerError: none is alive, and none will be.
            DeadlineError: none within deadlines.start_s.
        """
        deadline = time.monotonic() + self._config.deadlines.start_s
        while not (targets := self.engines()):
            if all(e.gone for e in self._engines.values()):
                raise WorkerError(self._all_gone())
            self._changed.clear()
            left = max(deadline - time.monotonic(), 0.0)
            await within(self._changed.wait(), left, "the restart of any rollout engine", "deadlines.start_s")
        return targets

    def mark_paused(self, targets: Sequence[EngineTarget], *, paused: bool) -> None:
        """For a weight sync; an engine that dies meanwhile comes back unpaused."""
        for target in targets:
            engine = self._engine_of(target)
            if engine is not None:
                engine.paused = paused
                engine.show()

    def mark_synced(self, targets: Sequence[EngineTarget], version: int) -> None:
        """These engines now hold `version`, which becomes the current one."""
        self.version = version
        for target in targets:
            engine = self._engine_of(target)
            if engine is not None:
                engine.version = version
        for engine in self._engines.values():
            self._reconsider(engine)
        self._kick()

    def engine_failed(self, target: EngineTarget, reason: str, *, blame_work: bool) -> None:
        """Treat an engine as dead: end it, move its work, restart it. `blame_work`: its requests may be the cause."""
        engine = self._engine_of(target)
        if engine is not None:
            self._died(engine, target.incarnation, reason, blame_work=blame_work)

    def _engine_of(self, target: EngineTarget) -> _Engine | None:
        """None when that life of the engine is over."""
        engine = self._by_name.get(target.name)
        if engine is None or not engine.alive or engine.incarnation != target.incarnation:
            return None
        return engine

    def _ask_for_sync(self) -> None:
        if self.on_stale is None or (self._stale_sync is not None and not self._stale_sync.done()):
            return
        self._stale_sync = self._spawn(self._sync_stale(self.on_stale))

    async def _sync_stale(self, sync: Callable[[], Awaitable[None]]) -> None:
        try:
            await sync()
        except (RayError, GrpoRayError) as e:
            if (lost := self.lost_learner()) is not None:
                # Who waits for these samples has to see to new learners; until then no engine would get any.
                for ticket in list(self._tickets):
                    ticket.fail(WorkerError(f"restarted rollout engines can't get the current weights: {lost}: {e}"))
                return
            self.on_trouble(f"restarted rollout engines did not get the current weights, trying again: {e}")
        if self._stale:
            # It failed, or the learner is updating: the sync that follows may be minutes away.
            await asyncio.sleep(BACKOFF_S)
        self._stale_sync = None
        self._kick()

    # Members

    def scale(self, number: int) -> None:
        """From now on so many engines, 1 or more: others join, or those leave that do least."""
        if self._closed:
            return
        staying = [e for e in self._engines.values() if not e.leaving]
        free = (i for i in itertools.count() if i not in self._engines)
        for index in [next(free) for _ in range(number - len(staying))]:
            self._engines[index] = engine = _Engine(index)
            self._by_name[engine.name] = engine
            self._keep(engine, self._join(engine))
        for engine in sorted(staying, key=_use)[: max(0, len(staying) - number)]:
            engine.leaving = True
            self._reconsider(engine)
            if not engine.work:
                self._retire(engine)
        self._changed.set()

    async def _join(self, engine: _Engine) -> None:
        try:
            await self._start_late(engine, self._config.deadlines.start_s)
        except (WorkerError, DeadlineError) as e:
            self.on_trouble(f"{engine.name} was to join, and is tried again: {e}")
            self._source.kill(engine.handle)
            await self._restart(engine, str(e))

    def _retire(self, engine: _Engine) -> None:
        """An engine that leaves and has no work any more."""
        if self._engines.get(engine.index) is engine and not self._closed:
            self._spawn(self._leave(engine))

    async def _leave(self, engine: _Engine) -> None:
        async with self.membership:
            if self._engines.get(engine.index) is not engine:
                return
            del self._engines[engine.index], self._by_name[engine.name]
            if engine.started:
                self._left.append(engine)
            engine.alive = False
            engine.show()
            self._reconsider(engine)
            for task in list(engine.tasks):
                task.cancel()
        if engine.handle is not None:
            await self._end(engine.handle)

    # Life and death

    def pids(self) -> dict[str, dict[str, int]]:
        """Engine -> `pid` of its actor and `core_pid` of vLLM's engine process, of the engines that are alive."""
        return {e.name: e.pids for e in self._engines.values() if e.alive}

    async def _start(self, engine: _Engine, limit_s: float) -> None:
        """Raises WorkerError or DeadlineError, with the end of the log."""
        c = self._config
        now = asyncio.get_running_loop().time
        began = now()
        engine.incarnation = next(self._lives)
        rollout = c.rollout
        if c.colocated and rollout.num_threads is None:
            threads = max(1, usable_cpus() // rollout.num_actors)
            rollout = rollout.model_copy(update={"num_threads": threads})
        engine.handle = start_named(
            self._source,
            RolloutActor,
            rollout,
            self._model,
            c.model.dtype,
            c.data.max_prompt_length + rollout.max_completion_length,
            self._run_dir,
            engine.index,
            c.seed,
            self._backend,
            c.model.trust_remote_code,
            AdapterOptions.of(c),
            c.colocated,
            c.data.template,
            run_dir=self._run_dir,
            name=engine.name,
            num_cpus=rollout.num_cpus,
            num_gpus=gpus_per_engine(c, self._on_gpu),
            max_restarts=0,
            **placed(rollout, self._placement, engine.index),
            runtime_env={"env_vars": rollout_env(rollout, on_gpu=self._on_gpu, backend=self._backend)},
        )
        log = Path(self._run_dir) / "logs" / f"{engine.name}.log"
        try:
            engine.pids = await within(
                _answer(engine.handle.ready.remote()),
                limit_s,
                f"the start of {engine.name}",
                "deadlines.start_s",
            )
        except DeadlineError as e:
            raise DeadlineError(f"{e}; the end of {log}:\n{log_tail(log)}") from None
        except (RayError, GrpoRayError) as e:
            why = fate(e, engine.name, self._kernel)
            if kind_of(e) == "out of memory":
                raise WorkerError(f"{engine.name} does not start: {why}") from None
            raise WorkerError(
                f"{engine.name} does not start: {core_error(log, why)}; the end of {log}:\n{log_tail(log)}"
            ) from None
        self._start_s = max(self._start_s, now() - began)
        engine.version = 0
        engine.alive = engine.started = True
        engine.paused = False
        engine.show()
        self._reconsider(engine)
        self._keep(engine, self._poll(engine, engine.incarnation))
        self._keep(engine, self._probe(engine, engine.incarnation))
        self._changed.set()
        self._kick()

    async def _start_late(self, engine: _Engine, limit_s: float) -> None:
        """`_start` while the run goes on: the cluster may have no room any more, which Ray does not tell."""
        asked = next(d for d in demands(self._config, self._on_gpu) if d.option == "rollout")
        where = f" on a node with the labels {dict(asked.labels)}" if asked.labels else ""
        told = asyncio.get_running_loop().call_later(
            LATE_S,
            self.on_trouble,
            f"{engine.name} has not started for {LATE_S:g} s: it loads the model, or waits for {asked.each}{where}",
        )
        try:
            await self._start(engine, limit_s)
        finally:
            told.cancel()

    def _died(self, engine: _Engine, incarnation: int, reason: str, *, blame_work: bool = True) -> None:
        if engine.incarnation != incarnation or not engine.alive or self._closed:
            return
        self.on_trouble(f"{engine.name} died and {'was to leave' if engine.leaving else 'is restarted'}: {reason}")
        engine.alive = False
        engine.version = None
        self._source.kill(engine.handle)
        work = [ticket for ticket in engine.work.values() if not ticket.done()]
        engine.work.clear()
        self._reconsider(engine)
        engine.show()
        for ticket in work:
            ticket.engine = None
        if blame_work and work:
            self._blame(work, engine, reason)
        self._requeue([ticket for ticket in work if not ticket.done()])
        if engine.leaving:
            self._retire(engine)
        else:
            self._keep(engine, self._restart(engine, reason))

    def _blame(self, work: Sequence[_Ticket], engine: _Engine, reason: str) -> None:
        """The engine died and worked on this; see the top of this file."""
        prompt_id = work[0].request.prompt_id
        lone = all(t.request.prompt_id == prompt_id for t in work)
        for ticket in work:
            ticket.deaths += 1
            ticket.lone_deaths += lone
        if max(t.lone_deaths for t in work) < POISONED_DEATHS:
            return
        engine.restarts = 0  # It is not the engine's fault.
        error = (
            f"prompt {prompt_id} ends rollout engines: {max(t.deaths for t in work)} died while they worked on it, "
            f"{POISONED_DEATHS} of them on nothing else, the last one {engine.name} ({reason}); look at this prompt, and at "
            f"logs/{engine.name}.log"
        )
        for ticket in [t for t in self._tickets if t.request.prompt_id == prompt_id]:
            ticket.fail(PoisonedError(error))

    async def _restart(self, engine: _Engine, reason: str) -> None:
        """A start that takes far longer than those before it (the engine hangs, or its node is gone and nowhere is room) is begun
        again with twice the time; while no other engine lives, as long as a start may take."""
        start_s = self._config.deadlines.start_s
        now = asyncio.get_running_loop().time
        self._died_at = now()
        limit_s = again_within(self._start_s, start_s)
        while engine.restarts < MAX_RESTARTS and not self._closed:
            engine.restarts += 1
            self._num_restarts += 1
            self._all_restarts += 1
            await asyncio.sleep(BACKOFF_S * 2 ** (engine.restarts - 1))
            left_s = self._died_at + start_s - now()
            try:
                await self._start_late(engine, limit_s if self.engines() else min(limit_s, left_s))
                return
            except WorkerError as e:
                reason = str(e)
                self._source.kill(engine.handle)
                self._died_at = now()
            except DeadlineError as e:
                self._source.kill(engine.handle)
                if now() >= self._died_at + start_s and not self.engines():
                    reason = f"does not start again: {e}"
                    break
                engine.restarts -= 1  # It died of nothing.
                limit_s = min(2 * limit_s, start_s)
        else:
            reason = f"died {MAX_RESTARTS + 1} times without a finished sample in between, the last time: {reason}"
        engine.gone = f"{engine.name} {reason}"
        engine.show()
        self._changed.set()
        if all(e.gone for e in self._engines.values()):
            for ticket in list(self._tickets):
                ticket.fail(WorkerError(self._all_gone()))

    def _all_gone(self) -> str:
        return "no rollout engine is left: " + "; ".join(e.gone for e in self._engines.values())

    async def _watch(self) -> None:
        """The deadline of every poll, and of every sample: from the moment an engine got it; while queued, from the last progress
        of any."""
        limit = self._config.deadlines.sample_s
        while True:
            late_s = self._poll_s + POLL_SLACK_S
            period_s = min(self._poll_s, limit / 50)
            await asyncio.sleep(period_s)
            now = time.monotonic()
            for engine in list(self._engines.values()):
                # Counted, not measured: answers that came while this process stood still are not read yet.
                engine.silent_s += period_s
                if engine.alive and engine.silent_s > late_s:
                    self._died(engine, engine.incarnation, f"it did not answer for {late_s:g} s")
                for ticket in engine.handed_before(now - limit):
                    ticket.fail(
                        DeadlineError(
                            f"{engine.name} did not finish {ticket.name} within {limit:g} s (deadlines.sample_s)"
                        )
                    )
            for ticket in self._queue if now - self._progress > limit else ():
                if now - ticket.since > limit and not ticket.done():
                    states = ", ".join(f"{e.name} {self._state(e)}" for e in self._engines.values())
                    ticket.fail(
                        DeadlineError(f"no engine took {ticket.name} for {limit:g} s (deadlines.sample_s): {states}")
                    )

    def _state(self, engine: _Engine) -> str:
        if engine.gone:
            return "is gone"
        if not engine.alive:
            return "restarts"
        return "is busy" if engine.version == self.version else "waits for the current weights"

    def _keep(self, engine: _Engine, work: Any) -> None:
        """A task that ends with the engine, if not before."""
        task: asyncio.Task[None] = asyncio.create_task(work)
        engine.tasks.add(task)
        task.add_done_callback(engine.tasks.discard)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """End all engines; what is not finished fails."""
        self._closed = True
        tasks = [*self._tasks, *(t for e in self._engines.values() for t in e.tasks)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_S)
        for ticket in list(self._tickets):
            ticket.engine = None
            ticket.fail(WorkerError("the rollout pool was closed"))
        engines = list(self._engines.values())
        for engine in engines:
            engine.alive = False
        await asyncio.gather(*(self._end(e.handle) for e in engines if e.handle is not None))

    async def _end(self, handle: Any) -> None:
        """Of its own accord, or by force."""
        try:
            await asyncio.wait_for(_answer(handle.shutdown.remote()), CLOSE_S)
        except (RayError, GrpoRayError, TimeoutError):
            pass
        finally:
            self._source.kill(handle)


def _use(engine: _Engine) -> tuple[bool, bool, int, int]:
    """What is lost with it: a life, or hope for one, or work under way. Of several that are alike the last leaves."""
    return engine.alive, not engine.gone, len(engine.work), -engine.index


async def _answer(ref: Any) -> Any:
    return await ref
