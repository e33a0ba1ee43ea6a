"""Rollout engines and learner ranks on the same devices, one kind at a time (`cluster.placement: colocated`).

    sampling   engines awake; the learner's states in the host's memory
    learning   engines asleep, their weights in the host's memory and without a KV cache; the learner's states on the device
    the sync   the learner's weights and the engines' on the device, nothing else

An engine that dies restarts in the engines' turn alone, for it takes what is free of its GPU; learners wait for its start.

An engine of several GPUs shares them with as many learner ranks, one on each.

On CPUs nothing moves: each kind has all cores while the other waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Protocol

from actors.cluster import gpus_per_engine, gpus_per_learner
from actors.weights.protocol import AsleepError
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError
from grpo_ray.loop.roles import Learner, Sampler, WeightSync
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.manifest import FileSum
from grpo_ray.types import SampleInfo, SampleRequest, SyncReport, Track, TrainBatch, UpdateReport


class SleepingSampler(Sampler, Protocol):
    on_stale: Callable[[], Awaitable[None]] | None

    async def sleep(self) -> None:
        """Free the device when what runs on it has finished."""
        ...

    async def wake(self, part: Literal["weights", "kv_cache"] | None = None) -> None:
        """Take the device back, whole or in part."""
        ...

    def engines(self) -> Sequence[object]:
        """The live engines."""
        ...

    async def wait_for_engines(self) -> Sequence[object]:
        """The live engines, at least one."""
        ...


class OffloadingLearner(Learner, Protocol):
    async def offload(self, *, keep_weights: bool) -> None:
        """Move states to the host's memory; a second call moves what the first kept."""
        ...

    async def reload(self) -> None:
        """Move all states back."""
        ...


class Turns:
    """The turns of learner and rollout engines. The first is the learner's: its ranks have just started, and the engines sleep."""

    def __init__(self, sampler: SleepingSampler, learner: OffloadingLearner, *, moves: bool) -> None:
        """`moves`: the learner's states leave the device between its turns."""
        self._sampler = sampler
        self._learner = learner
        self._moves = moves
        self._lock = asyncio.Lock()
        self._learning = True

    async def sampling(self) -> None:
        """Begin the engines' turn, which lasts until another turn begins. Engines that died meanwhile restart in it."""
        if self._learning:
            async with self._lock:
                await self._begin_sampling()

    @asynccontextmanager
    async def learning(self) -> AsyncIterator[None]:
        """The learner's turn, during the body and after it: until a sample is wanted, or weights are sent."""
        async with self._lock:
            await self._begin_learning()
            yield

    @asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """A weight sync's turn: the learner's weights and the engines' are on the device; the engines' turn follows. Where no
        engine is left, one restarts first, in a turn of its own."""
        async with self._lock:
            if not self._sampler.engines():
                await self._begin_sampling()
                await self._sampler.wait_for_engines()
            await self._begin_learning()
            await self._offload(keep_weights=True)
            await self._sampler.wake("weights")
            yield
            await self._offload(keep_weights=False)
            await self._sampler.wake("kv_cache")
            self._learning = False

    async def _begin_sampling(self) -> None:
        if self._learning:
            await self._offload(keep_weights=False)
            await self._sampler.wake()
            self._learning = False

    async def _begin_learning(self) -> None:
        if not self._learning:
            await self._sampler.sleep()
            if self._moves:
                await self._learner.reload()
            self._learning = True

    async def _offload(self, *, keep_weights: bool) -> None:
        if self._moves:
            await self._learner.offload(keep_weights=keep_weights)


class ColocatedSampler:
    """A `roles.Sampler` that takes turns with the learner."""

    def __init__(self, sampler: SleepingSampler, turns: Turns) -> None:
        self._sampler = sampler
        self._turns = turns

    async def generate(self, request: SampleRequest) -> SampleInfo:
        await self._turns.sampling()
        return await self._sampler.generate(request)

    def take_stats(self) -> dict[str, float]:
        return self._sampler.take_stats()

    def take_tracks(self) -> list[Track]:
        return self._sampler.take_tracks()


class ColocatedLearner:
    """A `roles.Learner` that takes turns with the rollout engines."""

    def __init__(self, learner: OffloadingLearner, turns: Turns) -> None:
        self._learner = learner
        self._turns = turns

    async def accumulate(self, _part: TrainBatch) -> None:
        raise ConfigError(
            "samplers and learners of one device take turns, so nothing is learned while others are sampled"
        )

    async def update(self, batch: TrainBatch) -> UpdateReport:
        async with self._turns.learning():
            return await self._learner.update(batch)

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        async with self._turns.learning():
            await self._learner.hold(place, export=export)

    async def write(self, place: CheckpointLocation) -> Mapping[str, FileSum]:
        return await self._learner.write(place)

    async def load(self, place: CheckpointLocation) -> None:
        async with self._turns.learning():
            await self._learner.load(place)


class StaleSync(WeightSync, Protocol):
    async def sync_stale(self) -> None:
        """Bring restarted engines up to date."""
        ...


class ColocatedWeights:
    """A `roles.WeightSync` between a learner's turn and an engines' turn. A restarted engine gets its weights in a turn of its
    own, when the others have finished what they sample."""

    TRIES = 3

    def __init__(self, weights: StaleSync, sampler: SleepingSampler, turns: Turns) -> None:
        self._weights = weights
        self._turns = turns
        sampler.on_stale = self._sync_stale

    async def sync(self, version: int) -> SyncReport:
        """As of the weight sync inside; where no engine is left to send to, it begins again with one that has restarted."""
        for left in reversed(range(self.TRIES)):
            async with self._turns.sending():
                try:
                    return await self._weights.sync(version)
                except AsleepError:
                    if not left:
                        raise
        raise AssertionError

    async def _sync_stale(self) -> None:
        async with self._turns.sending():
            await self._weights.sync_stale()


def check_colocated(config: RunConfig, *, has_gpus: bool) -> None:
    """Check that engines and learner ranks can share devices as the config asks.

    Raises:
        ConfigError: they can't.
    """
    if not config.colocated or not has_gpus:
        return
    rollout, learner = config.rollout, config.learner
    size = rollout.engine_size
    of_gpu = [gpus_per_engine(config, has_gpus) / size, gpus_per_learner(config, has_gpus)]
    wrong = [
        f"{what}; {mend}"
        for what, mend, bad in (
            (
                f"rollout.data_parallel_size is {rollout.data_parallel_size}",
                "an engine that shares its GPUs with learners is spread over them by rollout.tensor_parallel_size: use 1",
                rollout.data_parallel_size > 1,
            ),
            (
                f"rollout.num_actors is {rollout.num_actors}",
                f"each GPU holds an engine and a learner: use learner.num_actors, {learner.num_actors}",
                size == 1 and not config.engines_match_learners,
            ),
            (
                f"rollout.tensor_parallel_size is {rollout.tensor_parallel_size} and rollout.num_actors {rollout.num_actors}",
                f"an engine shares its GPUs with as many learners: use learner.num_actors {rollout.num_actors * size}",
                size > 1 and not config.engines_match_learners,
            ),
            (
                f"rollout.num_gpus is {rollout.num_gpus} and learner.num_gpus {learner.num_gpus}",
                "each GPU holds a part of an engine and a learner: leave both out, or let the parts of a GPU be above 0 and add up "
                "to 1 at most",
                min(of_gpu) <= 0 or sum(of_gpu) > 1 + 1e-9,
            ),
        )
        if bad
    ]
    if wrong:
        raise ConfigError(f"cluster.placement is colocated, and {'; '.join(wrong)}")
