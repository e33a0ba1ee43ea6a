"""The lives of a pool's rollout engines: they start, are polled, die, are restarted, join and leave.

The policy is that of `supervise`. Beyond it, the work of a dead engine moves to the others, and its prompt may be to blame
(`poison`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from ray.exceptions import RayError

from actors.deaths import is_blameless
from actors.environment.pool import Members
from actors.rollout.engine import MAX_RESTARTS, RolloutEngine, RolloutEngineKind
from actors.rollout.poison import blame, verdict
from actors.rollout.requests import PendingSample, RequestQueue
from actors.runtime import Actors, node_died
from actors.supervise import GivenUpError, Supervisor
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DeadlineError, GrpoRayError, WorkerError

POLL_S = 10.0
POLLS_PER_S = 10.0
"""The polls of a whole pool per second: a large one polls idle engines less often."""
POLL_SLACK_S = 60.0
"""An actor whose poll is this many seconds late is considered dead."""


class Starts:
    """The restarts of engines. There are none while learners have the devices: an engine measures and takes what is free of a GPU,
    and whoever comes back to it meanwhile finds too little."""

    def __init__(self) -> None:
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._none = asyncio.Event()
        self._none.set()
        self._running = 0

    @property
    def are_allowed(self) -> bool:
        return self._allowed.is_set()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[bool]:
        """Wait until starts are allowed; inside is one. True: it had to wait."""
        waited = not self._allowed.is_set()
        while not self._allowed.is_set():
            await self._allowed.wait()
        self._running += 1
        self._none.clear()
        try:
            yield waited
        finally:
            self._running -= 1
            if not self._running:
                self._none.set()

    def allow(self) -> None:
        self._allowed.set()

    async def forbid(self) -> None:
        """Forbid further ones, and wait for those under way."""
        self._allowed.clear()
        await self._none.wait()


class RolloutEngines:
    """Keeps the engines of a pool running; implements `supervise.Pool`. All methods belong to one event loop."""

    def __init__(
        self,
        config: RunConfig,
        kind: RolloutEngineKind,
        source: Actors,
        *,
        on_trouble: Callable[[str], None],
        on_stale: Callable[[], None],
    ) -> None:
        """For `on_stale` see `RequestQueue`."""
        self._deadlines = config.deadlines
        self._kind = kind
        self.on_trouble = on_trouble
        self.supervisor = Supervisor(kind, self, source, config.rollout.num_actors, config.deadlines.start_s)
        self.starts = Starts()
        self.supervisor.turn = self.starts.turn
        self.engines = self.supervisor.workers
        """The engines by index."""
        self.requests = RequestQueue(
            self.engines, config.rollout.max_num_seqs, on_leaving_idle=self._retire, on_stale=on_stale
        )
        self.environments: Members | None = None
        """The environment workers that engines use; None: a prompt has one answer."""
        self.changed = asyncio.Event()
        """An event, set when an engine is alive or given up, or when the number of engines is to change."""
        self.membership = asyncio.Lock()
        """A lock that a weight sync holds, so that no engine leaves meanwhile."""
        self._closed = False

    async def start(self) -> None:
        """Start all engines side by side; see `RolloutPool.create`."""
        await self.supervisor.start_all()
        self.supervisor.spawn(self.supervisor.watch(lambda: self._poll_s))
        self.supervisor.spawn(self._watch_deadlines())

    async def close(self) -> None:
        """End all engines; unfinished samples fail."""
        self._closed = True
        self.requests.close()
        await self.supervisor.close()

    # Their requests

    async def _poll(self, engine: RolloutEngine) -> None:
        """Collect what the engine has finished, until it dies; `_watch_deadlines` enforces the deadline of each poll."""
        life = engine.incarnation
        poll = engine.handle.poll.options(num_returns=2)
        while engine.incarnation == life and engine.alive and not self._closed:
            engine.silent_s = 0.0
            outcomes_ref, samples_ref = poll.remote(self._poll_s)
            try:
                outcomes = await outcomes_ref
            except (RayError, GrpoRayError) as e:
                # The other half of the result holds the same error; left unread, Ray prints it on every screen.
                await asyncio.gather(asyncio.wait_for(samples_ref, 1.0), return_exceptions=True)
                self.died(engine, life, self._kind.fate(e, engine), blame_work=not (node_died(e) or is_blameless(e)))
                return
            if outcomes:
                self.requests.settle(engine, outcomes, samples_ref)

    @property
    def _poll_s(self) -> float:
        return max(POLL_S, len(self.engines) / POLLS_PER_S)

    async def _watch_deadlines(self) -> None:
        """Enforce the deadline of every poll, and of every sample."""
        limit_s = self._deadlines.sample_s
        while True:
            late_s = self._poll_s + POLL_SLACK_S
            period_s = min(self._poll_s, limit_s / 50)
            await asyncio.sleep(period_s)
            for engine in list(self.engines.values()):
                # Counted, not measured: results that arrived while this process was stalled are not read yet.
                engine.silent_s += period_s
                if engine.alive and engine.silent_s > late_s:
                    self.died(engine, engine.incarnation, f"it did not answer for {late_s:g} s")
            self.requests.fail_late(limit_s)

    # Life and death

    def is_busy(self, engine: RolloutEngine) -> bool:
        return bool(engine.work)

    def worker_started(self, engine: RolloutEngine) -> None:
        engine.version = 0
        engine.paused = False
        if self.environments is not None:
            engine.handle.use_environments.remote(self.environments)
        engine.show()
        self.supervisor.keep(engine, self._poll(engine))
        self.changed.set()
        self.requests.engine_changed(engine)

    def worker_hangs(self, engine: RolloutEngine, incarnation: int) -> None:
        limit_s = self._kind.probe_s
        self.died(engine, incarnation, f"it hangs: no answer for {limit_s:g} s (deadlines.sync_s)")

    def worker_restarts(self, engine: RolloutEngine, cause: BaseException) -> None:
        """Do nothing: `died` has reported the death."""

    def died(self, engine: RolloutEngine, incarnation: int, reason: str, *, blame_work: bool = True) -> None:
        if engine.incarnation != incarnation or not engine.alive or self._closed:
            return
        self.on_trouble(f"{engine.name} died and {'was to leave' if engine.leaving else 'is restarted'}: {reason}")
        engine.alive = False
        engine.version = None
        self.supervisor.kill(engine)
        work = self.requests.take_back(engine)
        engine.show()
        if blame_work and work and blame(work):
            self._set_aside(work, engine, reason)
        self.requests.requeue(work)
        if engine.leaving:
            self._retire(engine)
        else:
            self.supervisor.keep(engine, self._restart(engine, WorkerError(reason)))

    def _set_aside(self, work: Sequence[PendingSample], engine: RolloutEngine, reason: str) -> None:
        """Fail the poisoned prompt that this work belongs to."""
        engine.restarts = 0  # It is not the engine's fault.
        self.requests.fail_poisoned(work[0].prompt_id, verdict(work, engine.name, reason))

    async def _restart(self, engine: RolloutEngine, cause: Exception) -> None:
        try:
            await self.supervisor.restart(engine, cause)
        except GivenUpError as e:
            self._give_up(engine, e)

    def _give_up(self, engine: RolloutEngine, why: GivenUpError) -> None:
        if why.late:
            reason = f"does not start again: {why.cause}"
        else:
            reason = f"died {MAX_RESTARTS + 1} times without a finished sample in between, the last time: {why.cause}"
        engine.gone = f"{engine.name} {reason}"
        engine.show()
        self.changed.set()
        if self.all_gone:
            self.requests.fail_all(self.why_all_gone())

    @property
    def all_gone(self) -> bool:
        return all(e.gone for e in self.engines.values())

    def why_all_gone(self) -> str:
        return "no rollout engine is left: " + "; ".join(e.gone for e in self.engines.values())

    def use_environments(self, members: Members) -> None:
        """Tell every engine, and those that start later, of the environment workers that serve now."""
        self.environments = members
        for engine in self.engines.values():
            if engine.alive:
                engine.handle.use_environments.remote(members)

    # Members

    def scale(self, number: int) -> None:
        """Change the number of engines, to 1 or more: others join, or the least busy ones leave."""
        if self._closed:
            return
        joining, leaving = self.supervisor.scale(number, _worth)
        for engine in joining:
            self.supervisor.keep(engine, self._join(engine))
        for engine in leaving:
            self.requests.engine_changed(engine)
            if not engine.work:
                self._retire(engine)
        self.changed.set()

    async def _join(self, engine: RolloutEngine) -> None:
        try:
            await self.supervisor.join(engine)
        except (WorkerError, DeadlineError) as e:
            self.on_trouble(f"{engine.name} was to join, and is tried again: {e}")
            await self._restart(engine, e)

    def _retire(self, engine: RolloutEngine) -> None:
        """Remove an engine that is to leave, once it has no work."""
        if self.engines.get(engine.index) is engine and not self._closed:
            self.supervisor.spawn(self._leave(engine))

    async def _leave(self, engine: RolloutEngine) -> None:
        async with self.membership:
            if self.engines.get(engine.index) is engine:
                self.supervisor.remove(engine)
                engine.show()
                self.requests.engine_changed(engine)


def _worth(engine: RolloutEngine) -> tuple[bool, bool, int, int]:
    """The engine's rank by what is lost with it: a live actor, or hope for one, or work. Among equals the last leaves."""
    return engine.alive, not engine.gone, len(engine.work), -engine.index
