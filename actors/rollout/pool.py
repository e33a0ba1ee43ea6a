"""All rollout engines as one `roles.Sampler`; the syncs' view of them.

    generate -> requests: queue, dispatch -> engine ... poll -> settle -> the sample
                        ^                               |
                        +-- supervise: it is restarted -+-- it died: poison decides whether a prompt is to blame

An engine is usable while it is alive and holds the current policy version. A restarted one loads the first weights and is stale
until a weight sync has reached it; `on_stale` asks for one when samples wait.

`scale` changes the number of engines at any time. One that joins is like a restarted one. One that leaves gets nothing new,
finishes what it has, and then ends; if it dies before, its work moves to the others as usual.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Literal, Self

from ray.exceptions import RayError

from actors.deaths import fate
from actors.environment.pool import Members
from actors.places import Places
from actors.rollout.engine import BACKOFF_S, RolloutEngine, RolloutEngineKind
from actors.rollout.engines import RolloutEngines
from actors.runtime import Actors, RayActors, within
from actors.weights.protocol import AsleepError, EngineTarget
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import GrpoRayError, WorkerError
from grpo_ray.types import SampleInfo, SampleRequest, Track


class RolloutPool:
    """Samples with a pool of engines; made by `RolloutPool.create`. All methods belong to the event loop that made it."""

    def __init__(
        self,
        config: RunConfig,
        model: str,
        run_dir: str,
        *,
        has_gpus: bool,
        actors: Actors,
        placement: Places | None = None,
    ) -> None:
        sync_s = config.deadlines.of_sync(has_gpus=has_gpus)
        self._deadlines = config.deadlines.model_copy(update={"sync_s": sync_s})
        self._world_size = config.rollout.engine_size
        kind = RolloutEngineKind(config, model, run_dir, has_gpus=has_gpus, source=actors, placement=placement)
        self._group = RolloutEngines(
            config, kind, actors, on_trouble=lambda text: self.on_trouble(text), on_stale=self._ask_for_sync
        )
        self._engines = self._group.engines
        self._requests = self._group.requests
        self._supervisor = self._group.supervisor
        self.stages_weights = kind.backend == "gloo"
        """Whether engines receive new weights beside sampling, and pause only to load them."""
        self.membership = self._group.membership
        """A lock that a weight sync holds, so that no engine leaves meanwhile."""
        self._stale_sync: asyncio.Task[None] | None = None
        self._stats_since = time.monotonic()
        self._reported_restarts = 0
        self.on_stale: Callable[[], Awaitable[None]] | None = None
        """The callback for samples that wait while live engines hold old weights."""
        self.lost_learner: Callable[[], str | None] = lambda: None
        """Why no learner is left to send current weights."""
        self.on_trouble: Callable[[str], None] = partial(print, "rollout:", flush=True)
        """The callback for errors that are being repaired."""

    @classmethod
    async def create(
        cls,
        config: RunConfig,
        model: str,
        run_dir: str,
        *,
        has_gpus: bool,
        actors: Actors | None = None,
        placement: Places | None = None,
    ) -> Self:
        """Start all engines side by side.

        Args:
            placement: a place for each GPU that engines share.

        Raises:
            WorkerError: an engine does not start; the message shows the end of its log.
            DeadlineError: the start takes longer than deadlines.start_s.
        """
        pool = cls(config, model, run_dir, has_gpus=has_gpus, actors=actors or RayActors(), placement=placement)
        try:
            await pool._group.start()
        except BaseException:
            await pool.close()
            raise
        return pool

    async def close(self) -> None:
        """End all engines; unfinished samples fail."""
        await self._group.close()

    def scale(self, number: int) -> None:
        """Change the number of engines, to 1 or more: others join, or the least busy ones leave."""
        self._group.scale(number)

    def use_environments(self, members: Members) -> None:
        """Play episodes at these workers from now on."""
        self._group.use_environments(members)

    # Sampling

    def generate(self, request: SampleRequest) -> asyncio.Future[SampleInfo]:
        """Sample one completion. Cancelling it frees its place in the engine.

        Raises (the future):
            DataError: the engine refuses the prompt (too long, a token out of its vocabulary).
            DeadlineError: an engine works on it for longer than deadlines.sample_s.
            PoisonedError: the prompt kills engines.
            WorkerError: no engine is left.
        """
        return self._requests.add(request)

    @property
    def num_unfinished(self) -> int:
        """The number of samples that are requested and unfinished."""
        return len(self._requests)

    def pids(self) -> dict[str, dict[str, int]]:
        """For each live engine, the `pid` of its actor and the `core_pid` of vLLM's engine process."""
        return {e.name: e.pids for e in self._engines.values() if e.alive}

    # The weight syncs' view

    @property
    def version(self) -> int:
        """The version of the weights that usable engines hold. Engines start with version 0, the given model."""
        return self._requests.version

    def engines(self, *, stale_only: bool = False) -> list[EngineTarget]:
        """The live engines."""
        return [
            e.target(self._world_size)
            for e in self._engines.values()
            if e.alive and not (stale_only and (e.leaving or e.version == self.version))
        ]

    async def wait_for_engines(self) -> list[EngineTarget]:
        """The live engines; waits for a restart in progress while there is none.

        Raises:
            AsleepError: none is alive, and none can start before the engines are woken.
            WorkerError: none is alive, and none will be.
            DeadlineError: none within deadlines.start_s.
        """
        deadline = time.monotonic() + self._deadlines.start_s
        while not (targets := self.engines()):
            if self._group.all_gone:
                raise WorkerError(self._group.why_all_gone())
            if self.asleep:
                raise AsleepError("no rollout engine is alive, and none can start while learners have the devices")
            self._group.changed.clear()
            left = max(deadline - time.monotonic(), 0.0)
            await within(self._group.changed.wait(), left, "the restart of any rollout engine", "deadlines.start_s")
        return targets

    def mark_paused(self, targets: Sequence[EngineTarget], *, paused: bool) -> None:
        """Mark engines for a weight sync; one that dies meanwhile comes back unpaused."""
        for engine in self._living(targets):
            engine.paused = paused
            engine.show()

    def mark_unsynced(self, targets: Sequence[EngineTarget]) -> None:
        """Record that a transfer broke in the middle: these engines hold parts of two versions, and get no work."""
        for engine in self._living(targets):
            engine.version = None
            self._requests.engine_changed(engine)

    def mark_synced(self, targets: Sequence[EngineTarget], version: int) -> None:
        """Record that these engines hold `version`, which becomes the current one."""
        for engine in self._living(targets):
            engine.version = version
        self._requests.use_version(version)

    def engine_failed(self, target: EngineTarget, reason: str, *, blame_work: bool) -> None:
        """Treat an engine as dead: end it, move its work, restart it. `blame_work` states that its requests may be the cause."""
        for engine in self._living([target]):
            self._group.died(engine, target.incarnation, reason, blame_work=blame_work)

    def _living(self, targets: Sequence[EngineTarget]) -> list[RolloutEngine]:
        """The live engines among those targets that are still the same incarnation."""
        lives = {(e.name, e.incarnation): e for e in self._engines.values() if e.alive}
        return [lives[life] for t in targets if (life := (t.name, t.incarnation)) in lives]

    def _ask_for_sync(self) -> None:
        if self.on_stale is not None and (self._stale_sync is None or self._stale_sync.done()):
            self._stale_sync = self._supervisor.spawn(self._sync_stale(self.on_stale))

    async def _sync_stale(self, sync: Callable[[], Awaitable[None]]) -> None:
        try:
            await sync()
        except (RayError, GrpoRayError) as e:
            if (lost := self.lost_learner()) is not None:
                # Whoever waits for these samples has to start a new learner; until then no engine would get any.
                self._requests.fail_all(f"restarted rollout engines can't get the current weights: {lost}: {e}")
                return
            self.on_trouble(f"restarted rollout engines did not get the current weights, trying again: {e}")
        if self._requests.any_stale:
            # It failed, or the learner is updating: the sync that follows may be minutes away.
            await asyncio.sleep(BACKOFF_S)
        self._stale_sync = None
        self._requests.kick()

    # Turns, where rollout engines and learner ranks share their devices

    @property
    def asleep(self) -> bool:
        """Whether the engines have given their devices to the learners; then none restarts."""
        return not self._group.starts.are_allowed

    async def sleep(self) -> None:
        """Make every engine free its GPU, when its samples in progress have ended, and one that restarts has started."""
        await self._group.starts.forbid()
        await self._of_all("sleep", lambda handle: handle.sleep.remote(), limit="sample_s")
        self.mark_paused(self.engines(), paused=True)

    async def wake(self, part: Literal["weights", "kv_cache"] | None = None) -> None:
        """Make every engine take its GPU back, or that part of it."""
        await self._of_all("wake", lambda handle: handle.wake.remote(part), limit="sync_s")
        if part != "weights":
            self._group.starts.allow()
            self.mark_paused(self.engines(), paused=False)

    async def _of_all(
        self, what: str, call: Callable[[Any], Awaitable[None]], *, limit: Literal["sample_s", "sync_s"]
    ) -> None:
        """Call all engines; one that fails is ended and restarted."""
        limit_s = getattr(self._deadlines, limit)

        async def ask(target: EngineTarget) -> None:
            try:
                await within(call(target.handle), limit_s, f"{what} of {target.name}", f"deadlines.{limit}")
            except (RayError, GrpoRayError) as e:
                self.engine_failed(target, f"it failed in {what}: {fate(e, target.name)}", blame_work=False)

        await asyncio.gather(*(ask(t) for t in self.engines()))

    # Reports

    def take_stats(self) -> dict[str, float]:
        """Restarts, and each engine's samples, tokens, busy seconds and their fraction of the time, since the last call."""
        now = time.monotonic()
        elapsed_s = max(now - self._stats_since, 1e-9)
        restarts = self._supervisor.num_restarts
        out = {"restarts": float(restarts - self._reported_restarts)}
        for engine in self._supervisor.reporting():
            out |= engine.take_stats(elapsed_s)
        self._stats_since, self._reported_restarts = now, restarts
        return out

    def take_most_waiting(self) -> int:
        """The most samples beyond what the engines sample at once, since the last call."""
        return self._requests.take_most_waiting()

    def live(self) -> dict[str, float]:
        """The pool's figures of this moment."""
        return {
            "queue/rollout": float(self._requests.num_queued),
            "under_way/rollout": float(sum(e.load for e in self._engines.values())),
            "alive/rollout": float(self._supervisor.num_alive),
            "restarts/rollout": float(self._supervisor.num_restarts),
        }

    def take_tracks(self) -> list[Track]:
        """When each engine was `sampling` (has a request, is not paused), `paused` or `restarting`, since the last call."""
        return self._supervisor.take_tracks()
