"""Weight synchronization, from the learner ranks to the rollout engines, on vLLM's own weight-transfer API.

    RayWeightSync (controller)          WeightSender (every learner rank)          vLLM worker (in a rollout actor)
      reconcile membership    ------>   weights_connect: rendezvous      <---->    init_weight_transfer_engine
      [nccl, ipc: pause every engine]
      send                    ------>   weights_send: gather, broadcast  ----->    start / update / finish(version)
                              <------   seconds, bytes, checksum                   [gloo: load and pack, beside sampling]
      [gloo: pause, swap in what is packed]                              ----->    start / update / finish(version)
      resume, mark synced

What a learner actor has to offer (each by one line, to its `actors.weights.sender.WeightSender`), on every rank:

    def weights_connect(self, targets: list[EngineTarget], generation: int) -> None:   self.sender.connect(targets, generation)
    def weights_send(self, version: int) -> SendReport:                                return self.sender.send(version)

    self.sender = WeightSender(
        ZeroWeightSource(engine.module.hf, bucket_bytes=config.weights.bucket_mb << 20, dtype=torch.bfloat16),
        rank=rank, backend="gloo", bucket_bytes=config.weights.bucket_mb << 20, timeout_s=config.deadlines.sync_s)

and what the learner group (all ranks as one) offers to `RayWeightSync` is the Protocol `LearnerWeights` of protocol.py.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from ray.exceptions import RayError

from actors.deaths import fate
from actors.runtime import late, within
from actors.weights.protocol import (
    LEAVE_PART,
    EnginePool,
    EngineSyncError,
    EngineTarget,
    LearnerWeights,
    SendReport,
)
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError, DeadlineError, GrpoRayError, WorkerError
from grpo_ray.types import SyncReport, Track

_Taken = tuple["SendReport", Sequence["EngineTarget"], float]
"""What the learner reported, the engines that have the weights, and seconds of pause."""
_GENERATIONS = itertools.count(1)
"""The numbers of transfer groups, one for each that is formed."""


def resolve_backend(config: RunConfig, *, has_gpus: bool) -> Literal["gloo", "nccl", "ipc"]:
    """The backend that `weights.backend: auto` stands for here; rollout engines and learner ranks both call this.

    Raises:
        ConfigError: the backend needs GPUs, and the cluster has none.
    """
    backend = config.weights.backend
    if backend != "auto":
        _check_backend(config, backend, has_gpus)
        return backend
    if not has_gpus:
        return "gloo"
    shared = _gpus_are_shared(config)
    if shared is None:
        raise ConfigError(
            f"rollout.num_gpus is {config.rollout.num_gpus} and learner.num_gpus {config.learner.num_gpus}: with "
            f"{config.rollout.num_actors} engines and {config.learner.num_actors} learners it is not certain which of them share a "
            "GPU, and weights go another way between those that do. Use cluster.placement=colocated, or whole GPUs"
        )
    return "ipc" if shared else "nccl"


def _check_backend(config: RunConfig, backend: str, has_gpus: bool) -> None:
    if backend != "gloo" and not has_gpus:
        raise ConfigError(f"weights.backend is {backend}, which needs GPUs, and the cluster has none; use auto or gloo")
    shared = _gpus_are_shared(config)
    if backend == "ipc" and shared is False:
        raise ConfigError(
            "weights.backend is ipc, which only reaches an engine on the GPU of a learner, and here they have GPUs of their own; "
            "use auto or nccl, or cluster.placement=colocated"
        )
    if backend == "nccl" and shared:
        raise ConfigError(
            "weights.backend is nccl, which takes no two processes on one GPU, and here an engine and a learner share each; use "
            "auto or ipc"
        )


def _gpus_are_shared(config: RunConfig) -> bool | None:
    """Whether every engine is on the GPU of a learner (True), or none is (False). None: it is not certain."""
    parts = [kind.num_gpus for kind in (config.rollout, config.learner) if kind.num_gpus is not None]
    if config.colocated:
        return True
    if all(part >= 1 for part in parts):
        return False
    # Ray packs parts of GPUs: two that fit on one are on one.
    alone = config.rollout.num_actors == config.learner.num_actors == 1
    return True if alone and len(parts) == 2 and sum(parts) <= 1 else None


class RayWeightSync:
    """`roles.WeightSync` over a pool of rollout engines and a learner group. A transfer that fails is retried with the engines
    that are alive then."""

    TRIES = 3

    def __init__(
        self, pool: EnginePool, learner: LearnerWeights, timeout_s: float, *, keep_kv_cache: bool = False
    ) -> None:
        """`keep_kv_cache`: see `WeightsConfig`."""
        self._pool = pool
        self._learner = learner
        self._timeout_s = timeout_s
        self._clear_cache = not keep_kv_cache
        self._connected: list[tuple[str, int]] = []
        self._tracks: list[Track] = []
        """The tracks of syncs for restarted engines, until the next report."""
        pool.on_stale = self.sync_stale

    async def sync(self, version: int) -> SyncReport:
        """Give every live engine the learner's weights under the name `version`.

        Raises:
            WorkerError: no engine could be brought up to date; the message names the last one that failed, or the learner.
        """
        async with self._pool.membership:
            started = time.monotonic()
            for left in reversed(range(self.TRIES)):
                targets = await self._pool.wait_for_engines()
                try:
                    report = await self._transfer(targets, version, started)
                except (EngineSyncError, DeadlineError) as e:
                    if left:
                        self._pool.on_trouble(f"{e}; {left} more tries")
                    else:
                        raise WorkerError(
                            f"weights of version {version} reached no engine in {self.TRIES} tries; the last: {e}"
                        ) from e
                else:
                    if report is not None:
                        return report
            raise WorkerError(
                f"weights of version {version} reached no engine in {self.TRIES} tries: each died before it had them"
            )

    async def sync_stale(self) -> None:
        """Bring restarted engines up to date while samples wait for them.

        This does nothing after a learner's update: the sync that follows reaches them too.
        """

        def wanted() -> bool:
            return self._pool.num_unfinished > 0 and not self._learner.unsent

        async with self._pool.membership:
            targets = self._pool.engines(stale_only=True)
            if targets and wanted():
                report = await self._transfer(targets, self._pool.version, time.monotonic(), wanted=wanted)
                self._tracks = list(report.tracks) if report else self._tracks

    async def _transfer(
        self, targets: Sequence[EngineTarget], version: int, started: float, wanted: Callable[[], bool] = lambda: True
    ) -> SyncReport | None:
        """Try one transfer. None: no engine was left to send to, or it is not `wanted` any more."""
        # This finds the engines that died unnoticed while it costs only themselves.
        targets = await self._each(targets, "probe")
        if not targets:
            return None
        take = self._stage_and_load if self._pool.stages_weights else self._send_paused
        taken = await take(targets, version, wanted)
        if taken is None:
            return None
        report, targets, pause_seconds = taken
        tracks, self._tracks = (*self._tracks, *report.get("tracks", ())), []
        self._pool.mark_synced(targets, version)
        return SyncReport(
            version=version,
            seconds=time.monotonic() - started,
            pause_seconds=pause_seconds,
            num_bytes=report["bytes"],
            checksum=report["checksum"],
            num_engines=len(targets),
            tracks=tracks,
        )

    async def _stage_and_load(
        self, targets: Sequence[EngineTarget], version: int, wanted: Callable[[], bool]
    ) -> _Taken | None:
        """Stage the weights while the engines sample, and pause them to swap. A transfer that breaks costs no engine."""
        try:
            report = await self._send(targets, version, wanted)
        except BaseException:
            self._connected = []
            raise
        if report is None:
            return None
        pause_started = time.monotonic()
        self._pool.mark_paused(targets, paused=True)
        targets = await self._each(targets, "pause", "keep", self._clear_cache)
        targets = await self._each(targets, "load_staged", version, report["checksum"])
        targets = await self._each(targets, "resume")
        self._pool.mark_paused(targets, paused=False)
        return (report, targets, time.monotonic() - pause_started) if targets else None

    async def _send_paused(
        self, targets: Sequence[EngineTarget], version: int, wanted: Callable[[], bool]
    ) -> _Taken | None:
        """Send into the weights that are sampled with. Engines that sleep are paused already, and have no KV cache to sample with
        before they are woken."""
        pauses = not self._pool.asleep
        pause_started = time.monotonic()
        if pauses:
            self._pool.mark_paused(targets, paused=True)
            targets = await self._each(targets, "pause", "keep", self._clear_cache)
        if not targets:
            return None
        try:
            report = await self._send(targets, version, wanted)
        except BaseException as e:
            self._connected = []
            await self._leave(targets, version, e)
            raise
        if pauses:
            targets = await self._each(targets, "resume")
            self._pool.mark_paused(targets, paused=False)
        return None if report is None else (report, targets, time.monotonic() - pause_started)

    async def _leave(self, targets: Sequence[EngineTarget], version: int, error: BaseException) -> None:
        """Let the engines leave a transfer that broke. They stay paused, and the next transfer replaces what they have of this one;
        one that can't leave is ended."""
        if isinstance(error, asyncio.CancelledError):
            for target in targets:
                self._pool.engine_failed(target, f"its weight sync to version {version} was given up", blame_work=False)
            return
        self._pool.mark_unsynced(targets)
        await ask_each(self._pool, targets, LEAVE_PART * self._timeout_s, "leave_transfer")

    async def _send(
        self, targets: Sequence[EngineTarget], version: int, wanted: Callable[[], bool]
    ) -> SendReport | None:
        await self._connect(targets)
        if not wanted():
            return None
        # The sender's own deadline comes first and names the engine; this one is for a learner that hangs.
        return await within(
            self._learner.send_weights(version),
            self._timeout_s + 30,
            f"the learner's transfer of weights {version} to {_names(targets)}",
            "deadlines.sync_s",
        )

    async def _connect(self, targets: Sequence[EngineTarget]) -> None:
        """Form the transfer group anew when its members changed."""
        members = [(t.name, t.incarnation) for t in targets]
        if members == self._connected:
            return
        await within(
            self._learner.connect_weights(targets, next(_GENERATIONS)),
            self._timeout_s + 30,
            f"connecting the learner with {_names(targets)}",
            "deadlines.sync_s",
        )
        self._connected = members

    async def _each(self, targets: Sequence[EngineTarget], method: str, *args: Any) -> list[EngineTarget]:
        """The engines that the call succeeded on; see `ask_each`."""
        answers, _ = await ask_each(self._pool, targets, self._timeout_s, method, *args)
        return [target for target, _ in answers]


async def ask_each(
    pool: EnginePool, targets: Sequence[EngineTarget], timeout_s: float, method: str, *args: Any
) -> tuple[list[tuple[EngineTarget, Any]], list[str]]:
    """Call a method of all engines at once. Those that fail or don't answer are reported to the pool as dead.

    Returns:
        The others, each with its result; and the errors of those.
    """
    failures: list[str] = []
    # One deadline for all: a task and a timer for each of a thousand engines would cost more than the rest of the sync.
    calls = [(t, asyncio.wrap_future(getattr(t.handle, method).remote(*args).future())) for t in targets]

    def fail(target: EngineTarget, error: BaseException) -> None:
        why = fate(error, target.name)
        failures.append(f"{target.name} failed in {method}: {why}")
        pool.engine_failed(target, f"it failed in {method}: {why}", blame_work=False)

    def look(target: EngineTarget, call: asyncio.Future[Any]) -> None:
        # At once: it restarts while others are waited for.
        if not call.cancelled() and isinstance(error := call.exception(), (RayError, GrpoRayError)):
            fail(target, error)

    for target, call in calls:
        call.add_done_callback(partial(look, target))
    if calls:
        await asyncio.wait([call for _, call in calls], timeout=timeout_s)
    answered = []
    for target, call in calls:
        if not call.done():
            call.cancel()
            fail(target, late(f"{method} of {target.name} for a weight sync", timeout_s, "deadlines.sync_s"))
        elif not isinstance(call.exception(), (RayError, GrpoRayError)):
            answered.append((target, call.result()))
    return answered, failures


def _names(targets: Sequence[EngineTarget]) -> str:
    return ", ".join(t.name for t in targets)
