"""The weight sync of LoRA adapters to the rollout engines (`model.lora.transfer: adapter`), through Ray's object store.

    RayAdapterSync (controller)        LearnerActor (every rank)        RolloutActor (every engine)
      put                    ------>   put_adapter: gather, ray.put
      load                   ----------------------------------------> load_adapter: fetch, check, add to vLLM
      mark synced            <------   bytes, checksum       <-------  seconds that the engine was stalled

Nothing is paused: a sample in progress finishes under the adapter that was current when its engine got it, and is labelled so. That
version is not older than the one at which the loop dispatched its group, and the loop dispatches no group that it would train
more than `max_staleness` steps later: the bound holds as it does for whole weights, whose first tokens are as old.

The controller keeps the reference on the current adapter: a restarted engine gets it without the learner.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from actors.runtime import within
from actors.weights.protocol import EnginePool, EngineTarget
from actors.weights.sync import RayWeightSync, ask_each
from grpo_ray.errors import WorkerError
from grpo_ray.types import SyncReport


@dataclass(frozen=True)
class AdapterReport:
    """What rank 0 gathered."""

    ref: Any
    """A Ray reference to `lora.adapter_bytes`."""
    num_bytes: int
    checksum: str


class LearnerAdapters(Protocol):
    """The learner group's side of a sync."""

    async def put_adapter(self) -> AdapterReport:
        """Call `put_adapter()` on every rank; returns the result of rank 0.

        The ranks must have the calls before this first awaits: the order of this call and of `update` is what makes the
        version true.
        """
        ...


class RayAdapterSync:
    """`roles.WeightSync` over a pool of rollout engines and a learner group.

    An engine that fails is ended and restarted by the pool; the others go on. While none is left, the sync is retried with
    those that came back.
    """

    TRIES = RayWeightSync.TRIES

    def __init__(self, pool: EnginePool, learner: LearnerAdapters, timeout_s: float) -> None:
        self._pool = pool
        self._learner = learner
        self._timeout_s = timeout_s
        self._current: AdapterReport | None = None
        """The adapter of `pool.version`. None: the bare model, with which engines start."""
        pool.on_stale = self.sync_stale

    async def sync(self, version: int) -> SyncReport:
        """Give every live engine the learner's adapter under the name `version`.

        Raises:
            WorkerError: no engine could be brought up to date; the message names the last one that failed, or the learner.
            DeadlineError: the learner did not gather the adapter in time.
        """
        async with self._pool.membership:
            started = time.monotonic()
            # The learner group's own deadline comes first and names the rank; this one is for a group that hangs.
            adapter = await within(
                self._learner.put_adapter(),
                self._timeout_s + 30,
                f"the learner's gathering of adapter {version}",
                "deadlines.sync_s",
            )
            failures = ["each died before it was asked"]
            for _ in range(self.TRIES):
                targets = await self._pool.wait_for_engines()
                loaded, new_failures = await self._load(targets, adapter, version)
                failures += new_failures
                if not loaded:
                    continue
                self._current = adapter
                self._pool.mark_synced([target for target, _ in loaded], version)
                return SyncReport(
                    version=version,
                    seconds=time.monotonic() - started,
                    pause_seconds=max(seconds for _, seconds in loaded),
                    num_bytes=adapter.num_bytes,
                    checksum=adapter.checksum,
                    num_engines=len(loaded),
                )
            raise WorkerError(
                f"the adapter of version {version} reached no engine in {self.TRIES} tries; the last: {failures[-1]}"
            )

    async def sync_stale(self) -> None:
        """Bring restarted engines up to date, also while the learner is busy: they get the adapter of the current version, not the
        learner's."""
        async with self._pool.membership:
            targets = self._pool.engines(stale_only=True)
            if targets and self._current is not None:
                version = self._pool.version
                loaded, _ = await self._load(targets, self._current, version)
                self._pool.mark_synced([target for target, _ in loaded], version)

    async def _load(
        self, targets: Sequence[EngineTarget], adapter: AdapterReport, version: int
    ) -> tuple[list[tuple[EngineTarget, float]], list[str]]:
        """The engines that have the adapter now, with the seconds that each was stalled; and the errors of the others."""
        # In a list: Ray would replace a bare reference by its value before the actor can report what is wrong with it.
        return await ask_each(
            self._pool, targets, self._timeout_s, "load_adapter", version, adapter.checksum, [adapter.ref]
        )
