"""A cluster on paper: the controller's own code over actors that take the time they are told instead of doing the work.

    Cursor, TrainLoop, Ledger, RolloutPool, RewardPool, RayWeightSync        as in a run
    rollout engines, reward workers, learner ranks                           simulated, behind what would be Ray handles

Time is virtual: while there is something to do the clock stands still, then it jumps to the next timer. So a step of the
cluster costs what the controller's code costs, and that is measured: the CPU time of this process outside the simulated actors,
less what reading the clock costs. The event loop's own is in it; Ray's is not, which a real run adds for each call of an actor and
each answer.
"""

from __future__ import annotations

import asyncio
import functools
import heapq
import itertools
import math
import os
import selectors
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from ray.exceptions import ActorDiedError, OutOfMemoryError

from actors.reward.pool import RewardPool
from actors.rollout.actor import POLL_LINGER_S, Outcome, RolloutActor
from actors.rollout.pool import RolloutPool
from actors.weights.protocol import SENDERS_PART, EngineSyncError, EngineTarget, SendReport
from actors.weights.sync import RayWeightSync
from grpo_ray.batch.plan import plan_batch
from grpo_ray.config.common import DeadlineConfig
from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.errors import DeadlineError, WorkerError
from grpo_ray.loop.roles import Roles
from grpo_ray.loop.train_loop import TrainLoop
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.manifest import FileSum
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import Event, StepEvent
from grpo_ray.types import (
    Group,
    Prompt,
    RewardScore,
    SampleInfo,
    SampleRequest,
    Score,
    ScoreRequest,
    ScoreStatus,
    TrainBatch,
    TrainSample,
    UpdateReport,
)

T = TypeVar("T")
PROMPT_TOKENS = 256
NUM_LENGTHS = 1 << 16
MAX_TURNS = 10_000


NO_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 09ec98) was \
22.59GB used / 23.54GB limit (0.9597)
Selected to kill: (Actor(9fd4): job ID=01, task name=run/reward-0:RewardActor.score, required resources={}, pid=32, actual memory \
used=0.06GB, worker ID=c8)
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
31\t14.05\tray::LearnerActor
Refer to the documentation on how to address the out of memory issue.
"""
"""As Ray says it."""


@dataclass(frozen=True)
class Plan:
    """What is simulated. Messages take what they took on this project's machines (a call of an actor, a poll's linger, pause and
    resume, a scorer that forks); the speeds of engines and learners are free."""

    samplers: int = 1024
    learners: int = 256
    scorers: int = 64
    prompts: int = 1024
    """P."""
    group: int = 16
    """G."""
    staleness: int = 1
    steps: int = 12
    rows: int = 1_000_000
    """Of the data set."""
    max_num_seqs: int = 32
    median_tokens: float = 2000.0
    sigma: float = 1.2
    """Of the logarithm of a completion's length."""
    min_tokens: int = 16
    max_tokens: int = 32_768
    token_s: float = 0.010
    """One token of all sequences of an engine that samples one."""
    token_s_per_seq: float = 0.0001
    """What each sequence adds to that."""
    prefill_tokens_per_s: float = 20_000.0
    """After a sync an engine reads again what it had written, under the new weights."""
    learner_tokens_per_s: float = 500.0
    """One rank, forward and backward, prompts included."""
    overlap: bool = True
    """Finished groups go through forward and backward while others are sampled."""
    optimizer_s: float = 1.0
    sync_s: float = 3.0
    call_s: float = 0.001
    pause_s: float = 0.05
    reward_s: float = 0.012
    deaths: tuple[float, ...] = ()
    """When an engine dies, virtual seconds."""
    freezes: tuple[float, ...] = ()
    """When an engine's core hangs: its actor goes on answering."""
    hangs: int = 0
    """The first calls of scorers, that never return."""
    frozen: int = 0
    """Of those, the ones whose worker does not answer anything else either."""
    scorer_deaths: float = math.inf
    """Each scorer dies in its call of this number."""
    out_of_memory: bool = False
    """That is what Ray says of dead scorers."""
    no_room: tuple[float, float] = (math.inf, math.inf)
    """Between these virtual seconds no actor starts: they wait for the second."""
    poison: frozenset[str] = frozenset()
    """Prompts that end an engine five virtual seconds after it got them."""
    scale: tuple[tuple[float, int, int], ...] = ()
    """(virtual seconds, samplers, scorers): from when on they are so many."""

    def config(self) -> RunConfig:
        data = {
            "model": {"tiny": {}, "dtype": "float32"},
            "data": {"train": {"path": "none"}, "max_prompt_length": PROMPT_TOKENS},
            "rollout": {
                "num_actors": self.samplers,
                "num_generations": self.group,
                "max_completion_length": self.max_tokens,
                "max_num_seqs": self.max_num_seqs,
            },
            "reward": {"functions": [{"name": "accuracy"}], "num_actors": self.scorers},
            "learner": {
                "num_actors": self.learners,
                "micro_batch_tokens": PROMPT_TOKENS + self.max_tokens,
                "overlap": self.overlap,
            },
            "algorithm": {"max_staleness": self.staleness},
            "prompts_per_step": self.prompts,
            "num_steps": self.steps,
            "checkpoint": {"every_steps": self.steps},
        }
        return build(RunConfig, data, "simulation")

    def with_(self, **changes: Any) -> Plan:
        return replace(self, **changes)

    def seconds_per_token(self, sequences: int) -> float:
        return self.token_s + self.token_s_per_seq * sequences

    @property
    def sampling_tokens_per_s(self) -> float:
        """Of all engines, full."""
        return self.samplers * self.max_num_seqs / self.seconds_per_token(self.max_num_seqs)

    @property
    def longest_s(self) -> float:
        """The longest sample, alone on its engine."""
        return self.max_tokens * self.seconds_per_token(1)


class Cluster:
    """What happens outside the controller's process: actors that finish something, at a virtual time.

    The event loop meets it where it meets the real world, in its selector: that is where time passes.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._aside_s = 0.0
        self.turns = 0
        """Of the event loop."""

    def controller_cpu_s(self) -> float:
        """CPU time of this process but for what was `aside`."""
        return time.process_time() - self._aside_s

    @contextmanager
    def aside(self) -> Iterator[None]:
        """CPU time that is the simulation's."""
        started = time.process_time()
        try:
            yield
        finally:
            self.spent_since(started)

    def spent_since(self, started: float) -> None:
        # A look at this clock costs microseconds, and half of the first and half of the last one are outside of the two: one more.
        now = time.process_time()
        again = time.process_time()
        self._aside_s += again - started + again - now

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what, args))

    def wait(self, timeout: float | None, anything_to_do: Callable[[], bool]) -> None:
        """To the first event that gives the event loop something to do, or as long as it can wait: to its own next timer."""
        started = time.process_time()
        until = math.inf if timeout is None else self.now + timeout
        while not anything_to_do():
            if self._events and self._events[0][0] <= until:
                self.now = max(self.now, self._events[0][0])
                while self._events and self._events[0][0] <= self.now:
                    _, _, what, args = heapq.heappop(self._events)
                    what(*args)
            elif timeout is None:
                raise AssertionError("everyone waits and nothing is under way: nothing would ever happen again")
            else:
                self.now = until
                break
        self.spent_since(started)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in the time of a `Cluster`: it stands still while anything is ready."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        super().__init__(_Selector(cluster, lambda: bool(self._ready)))  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._cluster.now

    def run_in_executor(self, _executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """In no time: another thread would be real time, for which this loop does not wait."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as e:
            future.set_exception(e)
        return future


class _Selector(selectors.SelectSelector):
    def __init__(self, cluster: Cluster, anything_to_do: Callable[[], bool]) -> None:
        super().__init__()
        self._cluster = cluster
        self._anything_to_do = anything_to_do
        self._turns = 0
        """Of the event loop since time last passed."""

    def select(self, timeout: float | None = None) -> list[Any]:
        self._turns += 1
        self._cluster.turns += 1
        if timeout is None or timeout > 0:
            self._turns = 0
            self._cluster.wait(timeout, self._anything_to_do)
        assert self._turns < MAX_TURNS, f"the controller spins: {MAX_TURNS} turns of the event loop without a wait"
        return []


def simulated(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of an actor: its CPU time is not the controller's."""

    @functools.wraps(method)
    def timed(self: Any, *args: Any) -> Any:
        started = time.process_time()
        try:
            return method(self, *args)
        finally:
            self.world.cluster.spent_since(started)
            self.world.calls += 1

    return timed


class _Method:
    """`handle.name`, as Ray has it."""

    __slots__ = ("remote",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function

    def options(self, **_: Any) -> Self:
        return self


class _Answer(asyncio.Future[Any]):
    """A reference to the result of a call, as Ray has it: awaited, or asked for its future."""

    __slots__ = ()

    def future(self) -> Self:
        return self


class _Ref:
    """Of the samples of one poll."""

    __slots__ = ("__weakref__",)

    def __await__(self) -> Iterator[Any]:
        return iter(())


@dataclass
class Totals:
    """Sums since the start, over all actors."""

    now_s: float = 0.0
    """Virtual."""
    controller_cpu_s: float = 0.0
    calls: int = 0
    """Of actors: what each costs in Ray comes on top."""
    turns: int = 0
    """Of the event loop."""
    engine_busy_s: float = 0.0
    sequence_s: float = 0.0
    update_s: float = 0.0
    transfer_s: float = 0.0
    late_s: float = 0.0
    """Updates that began later than their last score and the sync before allowed."""
    trained_tokens: int = 0
    groups: int = 0

    @property
    def controller_ms(self) -> float:
        """For each group."""
        return 1000 * self.controller_cpu_s / self.groups

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class World:
    """The simulated actors; a `runtime.Actors` for the pools."""

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self.plan = plan
        self.cluster = cluster
        rng = np.random.default_rng(0)
        drawn = np.exp(np.log(plan.median_tokens) + plan.sigma * rng.standard_normal(NUM_LENGTHS))
        self.lengths: list[int] = np.clip(drawn, plan.min_tokens, plan.max_tokens).astype(int).tolist()
        self.engines: dict[int, Engine] = {}
        self.sums = Totals()
        self.calls = 0
        self.scored_at: dict[str, float] = {}
        """Prompt -> when the last of its samples was scored; until it is trained."""
        self.num_queued = 0
        """Samples that waited in an engine for a place."""
        self.num_deaths = 0
        self.num_hung = 0
        self.num_scorer_deaths = 0

    def start(self, actor: type, *args: Any, **options: Any) -> Any:
        if actor is not RolloutActor:
            return Scorer(self)
        index = args[5]
        self.engines[index] = Engine(self, f"rollout-{index}")
        return self.engines[index]

    def kill(self, handle: Any) -> None:
        handle.die()

    def length(self, seed: int) -> int:
        return self.lengths[seed % NUM_LENGTHS]

    def answer(self, value: Any, seconds: float) -> _Answer:
        """To a call of an actor, after `seconds`."""
        future = _Answer(loop=asyncio.get_running_loop())
        self.cluster.at(self.cluster.now + seconds, _resolve, future, value)
        return future

    def start_s(self) -> float:
        """Seconds until an actor that is asked for now has started."""
        begin, end = self.plan.no_room
        return 1.0 if not begin <= self.cluster.now < end else end - self.cluster.now + 1.0

    def totals(self) -> Totals:
        for engine in self.engines.values():
            engine.advance()
        return replace(
            self.sums,
            now_s=self.cluster.now,
            controller_cpu_s=self.cluster.controller_cpu_s(),
            turns=self.cluster.turns,
            calls=self.calls,
        )


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


class Engine:
    """A rollout actor and its handle. Its sequences advance together, a token each per `Plan.seconds_per_token`."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.version = 0
        self.dead = False
        self.frozen = False
        self.joining = False
        """It waits for the others of a transfer group that is being formed."""
        self._paused = False
        self._plan = world.plan
        self._at = world.cluster.now
        """Where `_ticks` was brought up to date; after a pause, when it samples again."""
        self._ticks = 0.0
        """Tokens that a sequence which was always there would have."""
        self._running: list[tuple[float, int, SampleRequest, int, int]] = []
        """Heap: (tick of its end, ticket, request, tokens, version that began it)."""
        self._waiting: deque[tuple[int, SampleRequest]] = deque()
        self._appointment = 0
        """Number of the event that ends the next sequence; those before it are void."""
        self._outcomes: list[Outcome] = []
        self._poll: asyncio.Future[list[Outcome]] | None = None
        self._lingering = False
        self.submit = _Method(self._submit)
        self.cancel = _Method(self._cancel)
        self.poll = _Method(self._begin_poll)
        self.ready = _Method(lambda: world.answer({"pid": 0, "core_pid": 0}, world.start_s()))
        self.shutdown = _Method(lambda: world.answer(None, world.plan.call_s))
        self.probe = _Method(lambda: self._reply(world.plan.call_s))
        self.pause = _Method(self._pause)
        self.resume = _Method(self._resume)
        self.leave_transfer = _Method(self._leave_transfer)

    @property
    def load(self) -> int:
        return len(self._running) + len(self._waiting)

    def advance(self) -> None:
        """To the present."""
        passed = self.world.cluster.now - self._at
        if passed <= 0:
            return
        self._at = self.world.cluster.now
        if self._running and not self._paused:
            n = len(self._running)
            self._ticks += passed / self._plan.seconds_per_token(n)
            self.world.sums.engine_busy_s += passed
            self.world.sums.sequence_s += passed * n

    def die(self) -> None:
        self.advance()
        self.dead = True
        self._appointment += 1
        self._running.clear()
        self._waiting.clear()
        if self._poll is not None and not self._poll.done():
            self._poll.set_exception(self._death())

    def freeze(self) -> None:
        self.advance()
        self.frozen = True
        self._appointment += 1

    def _die_of_poison(self) -> None:
        held = [request for _, _, request, _, _ in self._running] + [request for _, request in self._waiting]
        if any(request.prompt_id in self._plan.poison for request in held):
            self.die()

    def _death(self) -> WorkerError:
        return WorkerError(f"{self.name}: the engine core died")

    @simulated
    def _submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        if self.dead:
            return
        self.advance()
        if any(request.prompt_id in self._plan.poison for _, request in requests):
            self.world.cluster.at(self.world.cluster.now + 5.0, self._die_of_poison)
        self._waiting.extend(requests)
        self._fill()
        self.world.num_queued += len(self._waiting)

    @simulated
    def _cancel(self, tickets: Sequence[int]) -> None:
        if self.dead:
            return
        self.advance()
        gone = set(tickets)
        self._running = [r for r in self._running if r[1] not in gone]
        heapq.heapify(self._running)
        self._waiting = deque(w for w in self._waiting if w[0] not in gone)
        self._fill()

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._plan.max_num_seqs:
            ticket, request = self._waiting.popleft()
            tokens = self.world.length(request.seed)
            heapq.heappush(self._running, (self._ticks + tokens, ticket, request, tokens, self.version))
        self._appointment += 1
        if self._running and not self._paused and not self.frozen:
            left = (self._running[0][0] - self._ticks) * self._plan.seconds_per_token(len(self._running))
            self.world.cluster.at(self._at + max(left, 0.0), self._finish, self._appointment)

    def _finish(self, appointment: int) -> None:
        if appointment != self._appointment:
            return
        self.advance()
        while self._running and self._running[0][0] <= self._ticks + 1e-3:
            _, ticket, request, tokens, version = heapq.heappop(self._running)
            reason = "length" if tokens == self._plan.max_tokens else "stop"
            row = len(self._outcomes)
            info = SampleInfo(
                request.prompt_id, request.index, PROMPT_TOKENS, tokens, version, reason, self.name, None, row
            )
            self._outcomes.append(Outcome(ticket, info))
        self._fill()
        self._linger()

    @simulated
    def _begin_poll(self, max_wait_s: float) -> tuple[asyncio.Future[list[Outcome]], _Ref]:
        self._poll = poll = asyncio.get_running_loop().create_future()
        self._lingering = False
        if self.dead:
            poll.set_exception(self._death())
        elif self._outcomes:
            self._linger()
        else:
            self.world.cluster.at(self.world.cluster.now + max_wait_s, self._end_poll, poll)
        return poll, _Ref()

    def _linger(self) -> None:
        """What finishes together travels together, as in the actor."""
        if self._outcomes and self._poll is not None and not self._lingering:
            self._lingering = True
            self.world.cluster.at(
                self.world.cluster.now + POLL_LINGER_S + self._plan.call_s, self._end_poll, self._poll
            )

    def _end_poll(self, poll: asyncio.Future[list[Outcome]]) -> None:
        if poll is self._poll and not poll.done():
            self._poll = None
            outcomes, self._outcomes = self._outcomes, []
            poll.set_result(outcomes)

    @simulated
    def _pause(self, mode: str, clear_cache: bool) -> _Answer:
        self.advance()
        self._paused = True
        self._appointment += 1
        return self._reply(self._plan.pause_s)

    @simulated
    def _resume(self) -> _Answer:
        self.advance()
        self._paused = False
        written = sum(tokens - (end - self._ticks) for end, _, _, tokens, _ in self._running)
        self._at = self.world.cluster.now + written / self._plan.prefill_tokens_per_s
        self._fill()
        return self._reply(self._plan.call_s)

    def _leave_transfer(self) -> _Answer:
        self.joining = self.joining and self.frozen
        return self._reply(self._plan.pause_s)

    def _reply(self, seconds: float) -> _Answer:
        if not self.dead and not self.frozen:
            return self.world.answer(None, seconds)
        answer = _Answer(loop=asyncio.get_running_loop())
        if self.dead:
            answer.set_exception(self._death())
        return answer


class Scorer:
    """A reward worker and its handle: one sample after the other."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.dead = False
        self._num_calls = 0
        self._hanging: _Answer | None = None
        self._is_frozen = False
        self.start = _Method(lambda: world.answer(0, world.start_s()))
        self.ping = _Method(self._ping)
        self.stop = _Method(lambda: world.answer(None, world.plan.call_s))
        self.score = _Method(self._score)

    def die(self) -> None:
        self.dead = True
        if self._hanging is not None and not self._hanging.done():
            self._hanging.set_exception(ActorDiedError())

    def _ping(self) -> _Answer:
        if self._hanging is not None and self._is_frozen:
            return _Answer(loop=asyncio.get_running_loop())
        return self.world.answer(None, self.world.plan.call_s)

    @simulated
    def _score(self, groups: list[list[ScoreRequest]]) -> _Answer:
        self._num_calls += 1
        if self.dead or self._num_calls >= self.world.plan.scorer_deaths:
            self.world.num_scorer_deaths += 1
            raise OutOfMemoryError(NO_MEMORY) if self.world.plan.out_of_memory else ActorDiedError()
        if self.world.num_hung < self.world.plan.hangs:
            self.world.num_hung += 1
            self._is_frozen = self.world.num_hung <= self.world.plan.frozen
            self._hanging = _Answer(loop=asyncio.get_running_loop())
            return self._hanging
        scores = [[self._score_one(r) for r in requests] for requests in groups]
        seconds = self.world.plan.call_s + self.world.plan.reward_s * sum(map(len, groups))
        for requests in groups:
            for request in requests:
                self.world.scored_at[request.sample.prompt_id] = self.world.cluster.now + seconds
        return self.world.answer(scores, seconds)

    def _score_one(self, request: ScoreRequest) -> Score:
        value = float(request.sample.num_tokens % 2)
        return Score(ScoreStatus.OK, value, (RewardScore("accuracy", ScoreStatus.OK, value),))


@dataclass
class Learners:
    """All ranks as one: `roles.Learner` and `weights.protocol.LearnerWeights`. A rank takes as long as the tokens that the
    product's own plan gives it; the update, as long as the slowest."""

    world: World
    unsent: bool = False
    targets: Sequence[EngineTarget] = ()
    free_since: float = 0.0
    on_update: Callable[[TrainBatch], None] | None = None
    give_up_s: float = SENDERS_PART * DeadlineConfig().of_sync(has_gpus=True)
    """When a transfer to an engine that hangs is given up."""

    async def accumulate(self, part: TrainBatch) -> None:
        with self.world.cluster.aside():
            seconds = self._passes_s(part.samples)
            self.world.sums.update_s += seconds
        await self.world.answer(None, seconds)
        self.free_since = self.world.cluster.now

    async def update(self, batch: TrainBatch) -> UpdateReport:
        plan, sums = self.world.plan, self.world.sums
        with self.world.cluster.aside():
            self.unsent = True
            began = self.world.cluster.now
            prompts = {s.prompt_id for s in batch.samples}
            possible = max(self.free_since, *(self.world.scored_at.pop(p) for p in prompts))
            sums.late_s += began - possible
            seconds = self._passes_s([s for s in batch.samples if s.part is None]) + plan.optimizer_s
            sums.update_s += seconds
            sums.trained_tokens += sum(s.num_tokens for s in batch.samples)
            sums.groups += len(prompts)
            if self.on_update is not None:
                self.on_update(batch)
        await self.world.answer(None, seconds)
        return UpdateReport(batch.step, {"loss/policy": 0.0, "grad_norm": 1.0}, seconds)

    def _passes_s(self, samples: Sequence[TrainSample]) -> float:
        """Forward and backward, on the slowest rank."""
        plan = self.world.plan
        if not samples:
            return 0.0
        lengths = [s.num_prompt_tokens + s.num_tokens for s in samples]
        (mini,) = plan_batch(
            lengths,
            [s.group for s in samples],
            num_ranks=plan.learners,
            num_mini_batches=1,
            micro_batch_tokens=PROMPT_TOKENS + plan.max_tokens,
        )
        return max(sum(lengths[i] for micro in rank for i in micro) for rank in mini.ranks) / plan.learner_tokens_per_s

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        self.targets = targets
        await self.world.answer(None, self.world.plan.call_s)

    async def send_weights(self, version: int) -> SendReport:
        self.unsent = False
        began = self.world.cluster.now
        while self.world.cluster.now < began + self.world.plan.sync_s or any(t.handle.frozen for t in self.targets):
            await self.world.answer(None, self.world.plan.sync_s / 8)
            self._look_after(self.world.cluster.now - began)
        with self.world.cluster.aside():
            for target in self.targets:
                target.handle.version = version
        self.world.sums.transfer_s += self.world.plan.sync_s
        return {"seconds": self.world.plan.sync_s, "bytes": 0, "checksum": ""}

    def _look_after(self, seconds: float) -> None:
        """As the sender does: a call of a dead engine fails at once, and one of an engine that hangs is waited for."""
        for target in self.targets:
            if target.handle.dead:
                raise EngineSyncError(f"weight sync: {target.name} failed in update_weights: the engine core died")
        if seconds > self.give_up_s:
            raise DeadlineError("weight sync: an engine did not answer update_weights in time")

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        await self.world.answer(None, 1.0)

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        await self.world.answer(None, 1.0)
        return {}

    async def load(self, place: CheckpointLocation) -> None:
        raise NotImplementedError


class Rows:
    """A data set of equal prompts."""

    fingerprint = "simulated"

    def __init__(self, count: int) -> None:
        self._count = count
        self._tokens = [1] * PROMPT_TOKENS
        self._columns: dict[str, Any] = {"answer": "1"}

    def __len__(self) -> int:
        return self._count

    def item(self, row: int, epoch: int) -> Prompt:
        return Prompt(f"rows/{epoch}/{row}", self._tokens, "prompt", None, self._columns)


class _NoLog:
    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass
class Result:
    plan: Plan
    how: str
    """What the loop returned."""
    steady: Totals
    """Between the steps `Simulation.window`: of a run that neither begins nor ends."""
    num_steps: int
    """Steps of that window."""
    seconds: float
    """Virtual, of the whole run."""
    controller_best_ms: float
    """Its CPU for each group of the cheapest step of the window. The work of a step is that of the others: what they cost more,
    other processes cost (caches, time that a hypervisor takes)."""
    late_s: float
    """Over the whole run: what the learners waited although their batch was scored and the sync before it done."""
    num_queued: int
    """Samples that waited in an engine."""
    num_deaths: int
    num_scorer_deaths: int
    troubles: list[str]
    """What the pool of samplers told of."""
    alive: tuple[int, int]
    """Samplers and scorers at the end."""
    trained: list[list[str]] = field(default_factory=list)
    """Prompts of each step, where asked for."""

    @property
    def ideal_s(self) -> float:
        """Of a step: its samples on samplers that are always full, or its updates; the slower of the two."""
        return max(self.sampling_s, self.update_s)

    @property
    def sampling_s(self) -> float:
        return self.steady.trained_tokens / self.plan.sampling_tokens_per_s / self.num_steps

    @property
    def update_s(self) -> float:
        return self.steady.update_s / self.num_steps

    @property
    def step_s(self) -> float:
        return self.steady.now_s / self.num_steps

    @property
    def of_ideal(self) -> float:
        return self.ideal_s / self.step_s

    @property
    def bound_s(self) -> float:
        """Of a step, by the longest sample too: what is dispatched with one policy is trained at most `staleness` updates later,
        so that it has the time of that many steps."""
        k = self.plan.staleness
        if k:
            return max(self.ideal_s, self.plan.longest_s / k)
        if self.plan.overlap:
            return max(self.ideal_s, self.plan.longest_s) + self.plan.optimizer_s
        return max(self.sampling_s, self.plan.longest_s) + self.update_s

    @property
    def learners_idle(self) -> float:
        """Part of the time in which they neither learn nor send weights."""
        return 1 - (self.steady.update_s + self.steady.transfer_s) / self.steady.now_s

    @property
    def samplers_idle(self) -> float:
        """Part of the time of an engine without any sequence."""
        return 1 - self.steady.engine_busy_s / (self.steady.now_s * self.plan.samplers)

    @property
    def places_taken(self) -> float:
        """Part of `max_num_seqs`."""
        return self.steady.sequence_s / (self.steady.now_s * self.plan.samplers * self.plan.max_num_seqs)

    @property
    def controller_ms(self) -> float:
        """CPU of the controller for each group."""
        return self.steady.controller_ms


class Simulation:
    """One run of `plan` in `folder`."""

    def __init__(self, plan: Plan, folder: Path, *, on_step: Callable[[int, World], None] | None = None) -> None:
        self.plan = plan
        self.run_dir = RunDir(folder)
        # Sampling ahead takes its time to fill up, and ends before the run does.
        ahead = plan.staleness + 1
        self.window = (ahead, plan.steps - ahead) if plan.steps > 3 * ahead else (1, plan.steps)
        self._on_step = on_step
        self._first = self._last = Totals()
        """Of the window."""
        self._best_ms = math.inf
        self._trained: list[list[str]] = []

    def run(self, *, keep_batches: bool = False) -> Result:
        cluster = Cluster()
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(cluster)) as runner:
            return runner.run(self._run(World(self.plan, cluster), keep_batches))

    async def _run(self, world: World, keep_batches: bool) -> Result:
        config = self.plan.config()
        learners = Learners(world)
        if keep_batches:
            learners.on_update = lambda b: self._trained.append(list(dict.fromkeys(s.prompt_id for s in b.samples)))
        ledger = Ledger(self.run_dir.ledger)
        run_dir = str(self.run_dir.path)
        sampler = await RolloutPool.create(config, "none", run_dir, has_gpus=True, actors=world)
        troubles: list[str] = []
        sampler.on_trouble = troubles.append
        scorer = await RewardPool.create(config.reward, run_dir, actors=world)
        weights = RayWeightSync(sampler, learners, config.deadlines.of_sync(has_gpus=True))

        def emit(event: Event) -> None:
            if isinstance(event, StepEvent):
                with world.cluster.aside():
                    learners.free_since = world.cluster.now
                    self._mark(event.step, world.totals())
                    if self._on_step is not None:
                        self._on_step(event.step, world)

        loop = TrainLoop(
            config,
            Roles(sampler, scorer, learners, weights, _NoLog()),
            Cursor(Rows(self.plan.rows), seed=config.seed, shuffle=True),
            {},
            ledger,
            self.run_dir,
            [],
            emit,
        )
        for number, when in enumerate(self.plan.deaths):
            world.cluster.at(when, self._kill, world, number)
        for number, when in enumerate(self.plan.freezes):
            world.cluster.at(when, lambda n: self._busiest(world, n).freeze(), number)
        for when, samplers, scorers in self.plan.scale:
            world.cluster.at(when, sampler.scale, samplers)
            world.cluster.at(when, scorer.scale, scorers)
        try:
            how = await loop.run()
            alive = (int(sampler.live()["alive/rollout"]), int(scorer.live()["alive/reward"]))
        finally:
            await scorer.close()
            await sampler.close()
            ledger.close()
        return Result(
            self.plan,
            how,
            self._last - self._first,
            self.window[1] - self.window[0],
            world.cluster.now,
            self._best_ms,
            world.sums.late_s,
            world.num_queued,
            world.num_deaths,
            world.num_scorer_deaths,
            troubles,
            alive,
            self._trained,
        )

    def _mark(self, step: int, totals: Totals) -> None:
        first, last = self.window
        if step == first:
            self._first = totals
        elif first < step <= last:
            self._best_ms = min(self._best_ms, (totals - self._last).controller_ms)
        if step <= last:
            self._last = totals

    def _kill(self, world: World, number: int) -> None:
        engine = self._busiest(world, number)
        world.num_deaths += not engine.dead
        engine.die()

    def _busiest(self, world: World, number: int) -> Engine:
        """Of a few: one that has something to lose."""
        return max((world.engines[(number * 7 + i) % len(world.engines)] for i in range(4)), key=lambda e: e.load)


def oldest_trained(ledger: Path) -> int:
    """The staleness bound as the ledger has it: updates between a group's oldest token and its training, at most."""
    with sqlite3.connect(ledger) as db:
        (age,) = db.execute("SELECT MAX(step - 1 - min_version) FROM groups WHERE state = 'trained'").fetchone()
    return int(age)


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
