"""Engines and learners in turns on the same GPUs, over a simulated cluster: the pool, its supervisor and the weight sync as in a
run, on devices that say so when two have them at once, or when an engine samples without a KV cache."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import pytest

from actors.control.colocated import ColocatedLearner, ColocatedSampler, ColocatedWeights, Turns
from actors.rollout.pool import RolloutPool
from actors.weights.sync import RayWeightSync
from grpo_ray.errors import WorkerError
from grpo_ray.types import SampleInfo, SampleRequest, SamplingParams, TrainBatch
from tests.bench.simulated import Cluster, Engine, Learners, Plan, VirtualLoop, World, _Answer, _Method

PLAN = Plan(samplers=2, learners=2, max_num_seqs=4, median_tokens=100.0, max_tokens=200)
START_S, UPDATE_S = 40.0, 300.0


class Devices(World):
    """The actors of GPUs that are shared; `wrong` is what a GPU would have died of."""

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        super().__init__(plan, cluster)
        self.learners_hold: Literal["all", "weights", "nothing"] = "nothing"
        self.starting = 0
        self.starts_s: list[float] = []
        self.wrong: list[str] = []
        self.breaks_starts = False

    def start(self, actor: type, *args: Any, **options: Any) -> Any:
        engine = super().start(actor, *args, **options)
        self.starts_s.append(self.cluster.now)
        self.starting += 1
        if self.learners_hold != "nothing":
            self.wrong.append(f"{engine.name} starts beside a learner")
        own = SharingEngine(self, engine.name)
        self.engines[args[5]] = own
        return own


class SharingEngine(Engine):
    world: Devices

    def __init__(self, world: World, name: str) -> None:
        super().__init__(world, name)
        self.cache_is_mapped = True
        self.sleep = _Method(lambda: self._lie_down())
        self.wake = _Method(lambda part: self._wake(part))
        self.ready = _Method(self._ready)

    def _ready(self) -> _Answer:
        if self.world.breaks_starts:
            self.die()
        answer = self._reply(0.0) if self.dead else self.world.answer({"pid": 0, "core_pid": 0}, START_S)
        answer.add_done_callback(self._started)
        return answer

    def _started(self, _: Any) -> None:
        self.world.starting -= 1

    def _lie_down(self) -> _Answer:
        self.cache_is_mapped = False
        self._paused = True
        return self._reply(0.5)

    def _wake(self, part: str | None) -> _Answer:
        if part != "weights":
            self.cache_is_mapped = True
            super()._resume()
        return self._reply(0.5)

    def _resume(self) -> _Answer:
        if not self.cache_is_mapped:
            self.world.wrong.append(f"{self.name} is resumed without a KV cache")
        return super()._resume()


class SharingLearners(Learners):
    world: Devices

    async def offload(self, *, keep_weights: bool) -> None:
        await self.world.answer(None, 1.0)
        self.world.learners_hold = "weights" if keep_weights and self.world.learners_hold != "nothing" else "nothing"

    async def reload(self) -> None:
        if self.world.starting:
            self.world.wrong.append("learners come back while an engine starts")
        self.world.learners_hold = "all"
        await self.world.answer(None, 1.0)

    async def update(self, batch: Any) -> Any:
        self.unsent = True
        if self.world.learners_hold != "all":
            self.world.wrong.append("learners learn without their states")
        await self.world.answer(None, UPDATE_S)


class Run:
    def __init__(self, world: Devices, pool: RolloutPool) -> None:
        self.world = world
        self.pool = pool
        self.troubles: list[str] = []
        pool.on_trouble = self.troubles.append
        learners = SharingLearners(world)
        world.learners_hold = "all"
        self.turns = Turns(pool, learners, moves=True)
        self.learner = ColocatedLearner(learners, self.turns)
        self.weights = ColocatedWeights(RayWeightSync(pool, learners, 60.0), pool, self.turns)
        self.sampler = ColocatedSampler(pool, self.turns)
        self._seeds = iter(range(10_000))

    async def sample(self, number: int = 8) -> list[SampleInfo]:
        params = SamplingParams(1.0, 1.0, -1, 0.0, 64, ())
        requests = [SampleRequest(f"rows/0/{i}", 0, [1], next(self._seeds), params) for i in range(number)]
        return await asyncio.gather(*map(self.sampler.generate, requests))

    async def update(self) -> None:
        batch: Any = TrainBatch(0, [], 1.0)
        await self.learner.update(batch)

    @property
    def now(self) -> float:
        return self.world.cluster.now


def in_turns(folder: Path, work: Callable[[Run], Coroutine[Any, Any, None]], plan: Plan = PLAN) -> None:
    cluster = Cluster()

    async def all_of_it() -> None:
        world = Devices(plan, cluster)
        pool = await RolloutPool.create(plan.config(), "none", str(folder), has_gpus=True, actors=world)
        await pool.sleep()
        try:
            run = Run(world, pool)
            await work(run)
            assert run.world.wrong == []
        finally:
            await pool.close()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(cluster)) as runner:
        runner.run(all_of_it())


def test_an_engine_that_dies_in_the_learners_turn_restarts_in_its_own(tmp_path: Path) -> None:
    async def work(run: Run) -> None:
        await run.sample()
        update = asyncio.create_task(run.update())
        await asyncio.sleep(UPDATE_S / 2)
        run.pool.engine_failed(run.pool.engines()[0], "its node is gone", blame_work=False)
        await update
        assert len(run.world.starts_s) == 2, "none starts while learners have the devices"
        ended = run.now
        assert (await run.weights.sync(1)).num_engines == 1
        infos = await run.sample()
        assert {i.worker for i in infos} == {"rollout-1"}
        assert ended < run.world.starts_s[2] < ended + 10
        while len(run.pool.engines()) < 2:
            await asyncio.sleep(1.0)
        workers: set[str] = set()
        while workers != {"rollout-0", "rollout-1"}:
            infos = await run.sample()
            workers = {i.worker for i in infos}
        assert {i.min_version for i in infos} == {1}

    in_turns(tmp_path, work)


def test_learners_wait_for_an_engine_that_starts(tmp_path: Path) -> None:
    async def work(run: Run) -> None:
        await run.sample()
        run.pool.engine_failed(run.pool.engines()[0], "it died", blame_work=False)
        await asyncio.sleep(2.0)
        assert len(run.world.starts_s) == 3
        await run.update()
        assert run.world.starts_s[2] + START_S < run.now - UPDATE_S
        assert (await run.weights.sync(1)).num_engines == 2

    in_turns(tmp_path, work)


def test_the_only_engine_that_dies_in_the_learners_turn_is_there_for_the_sync(tmp_path: Path) -> None:
    async def work(run: Run) -> None:
        await run.sample()
        update = asyncio.create_task(run.update())
        await asyncio.sleep(UPDATE_S / 2)
        run.pool.engine_failed(run.pool.engines()[0], "it died", blame_work=False)
        await update
        ended = run.now
        assert (await run.weights.sync(1)).num_engines == 1
        assert run.now - ended < START_S + 20
        assert {i.min_version for i in await run.sample()} == {1}

    in_turns(tmp_path, work, PLAN.with_(samplers=1, learners=1))


def test_the_only_engine_that_dies_in_a_sync_comes_back_and_gets_its_weights(tmp_path: Path) -> None:
    async def work(run: Run) -> None:
        await run.sample()
        await run.update()
        run.world.cluster.at(run.now + 2.5, run.world.engines[0].die)
        began = run.now
        assert (await run.weights.sync(1)).num_engines == 1
        assert run.now - began < START_S + 30
        assert len(run.world.starts_s) == 2
        assert {i.min_version for i in await run.sample()} == {1}

    in_turns(tmp_path, work, PLAN.with_(samplers=1, learners=1))


def test_a_pool_whose_engine_never_starts_again_ends_the_sync_in_the_end(tmp_path: Path) -> None:
    async def work(run: Run) -> None:
        await run.sample()
        await run.update()
        run.world.breaks_starts = True
        run.pool.engine_failed(run.pool.engines()[0], "it died", blame_work=False)
        with pytest.raises(WorkerError, match="no rollout engine is left"):
            await run.weights.sync(1)

    in_turns(tmp_path, work, PLAN.with_(samplers=1, learners=1))


def test_an_engine_that_waits_for_current_weights_is_not_resumed_before_it_has_a_cache(tmp_path: Path) -> None:
    async def work(run: Run) -> None:
        await run.sample()
        await run.update()
        await run.weights.sync(1)
        samples = asyncio.create_task(run.sample(32))
        await asyncio.sleep(0.5)
        run.pool.engine_failed(run.pool.engines()[0], "it died", blame_work=False)
        assert {i.min_version for i in await samples} == {1}
        await asyncio.sleep(START_S)
        assert {i.min_version for i in await run.sample(32)} == {1}

    in_turns(tmp_path, work, PLAN.with_(samplers=1, learners=1))
