"""The pools of a run, started side by side and ended together; learner ranks are replaced while the others live on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from actors.cluster import has_gpus
from actors.control.colocated import ColocatedLearner, ColocatedSampler, ColocatedWeights, Turns
from actors.control.learning import import_learning
from actors.environment.pool import EnvironmentPool
from actors.places import Places, reserve_pairs
from actors.reward.by_function import RewardPools
from actors.reward.pool import RewardPool
from actors.rollout.pool import RolloutPool
from actors.start_timeout import StartTimeout
from actors.weights.adapter_sync import RayAdapterSync
from actors.weights.sync import RayWeightSync
from grpo_ray.config.reward import SHARED_POOL, RewardConfig
from grpo_ray.config.scaling import Counts
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import DeadlineError
from grpo_ray.loop.evaluate import vote_config
from grpo_ray.loop.roles import Learner, Sampler, WeightSync
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.run_dir import RunDir

if TYPE_CHECKING:
    from actors.learner.group import LearnerGroup

P = TypeVar("P", RolloutPool, RewardPool, EnvironmentPool, "LearnerGroup")


@dataclass(frozen=True)
class Started:
    sampler: Sampler
    scorer: RewardPool | RewardPools
    learner: Learner
    weights: WeightSync
    voter: RewardPool | None


class Workers:
    """The pools of a run, started side by side and ended together, whatever happens in between."""

    def __init__(
        self,
        config: RunConfig | SftConfig,
        run: RunDir,
        model: str,
        phase: Callable[[str, str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._config = config
        self._run_dir = str(run.path)
        self._model = model
        self._phase = phase
        self._warn = warn
        self._gpus = has_gpus()
        self._placement: Places | None = None
        self._pools: list[RolloutPool | RewardPool | EnvironmentPool | LearnerGroup] = []
        self._sampler: RolloutPool | None = None
        self._scorer: RewardPool | RewardPools | None = None
        self._environments: EnvironmentPool | None = None
        self._learner: LearnerGroup | None = None
        self._num_steps = 0
        self._learner_timeout = StartTimeout(config.deadlines.start_s)

    async def __aenter__(self) -> Workers:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(p.close() for p in self._pools), return_exceptions=True)
        if self._placement is not None:
            self._placement.remove()

    def live(self) -> dict[str, float]:
        """The pools' figures of this moment."""
        kinds = RolloutPool | RewardPool | EnvironmentPool
        return {k: v for p in self._pools if isinstance(p, kinds) for k, v in p.live().items()}

    @property
    def lost_learner(self) -> str | None:
        """See `LearnerGroup.lost`."""
        return self._learner.lost if self._learner else None

    async def start_all(self, num_steps: Awaitable[int]) -> Started:
        assert isinstance(self._config, RunConfig)
        in_turns = self._config.colocated
        async with asyncio.TaskGroup() as tasks:
            # The slowest start first: all that start share this machine's cores.
            pair = tasks.create_task(self._start_in_turns(num_steps) if in_turns else self._start_together(num_steps))
            scorer = tasks.create_task(self.start_scorer())
            voter = tasks.create_task(self.start_voter())
        return self._joined(*pair.result(), scorer.result(), voter.result())

    async def replace_learner(self, before: Started) -> Started:
        """Start new ranks for lost ones; everything else lives on."""
        assert isinstance(self._config, RunConfig)
        assert self._sampler is not None
        await self.close_learner()
        if self._config.colocated:
            await self._sampler.sleep()
        learner = await self.start_learner_again()
        return self._joined(self._sampler, learner, before.scorer, before.voter)

    @property
    def num_learners(self) -> int:
        return self._learner.num_ranks if self._learner else 0

    def take_most_waiting(self) -> Counts:
        """See `actors.control.scaler.WorkerGroup`, as for `reconfigure`."""
        assert self._sampler is not None
        assert self._scorer is not None
        return {"rollout": self._sampler.take_most_waiting(), "reward": self._scorer.take_most_waiting()}

    def reconfigure(self, config: RunConfig) -> None:
        assert self._sampler is not None
        assert self._scorer is not None
        self._config = config
        self._sampler.scale(config.rollout.num_actors)
        self._scorer.scale(config.reward.num_actors)
        if self._environments is not None and config.environment is not None:
            self._environments.scale(config.environment.num_actors)

    async def change_learner(self, place: CheckpointLocation | None) -> tuple[Learner, WeightSync]:
        """See `roles.Scaler.change_learners`. Engines that are stale meanwhile wait: until the new ranks have loaded what they are
        to send, they would send the starting model."""
        assert self._sampler is not None
        self._sampler.on_stale = _no_weights_yet
        await self.close_learner()
        learner = await self.start_learner(self._num_steps)
        if place is not None:
            await learner.load(place)
        return learner, self._weight_sync(self._sampler, learner)

    async def close_learner(self) -> None:
        if self._learner is not None:
            await self._learner.close()
            self._pools.remove(self._learner)
            self._learner = None

    def _joined(
        self, sampler: RolloutPool, learner: LearnerGroup, scorer: RewardPool | RewardPools, voter: RewardPool | None
    ) -> Started:
        assert isinstance(self._config, RunConfig)
        weights = self._weight_sync(sampler, learner)
        if not self._config.colocated:
            return Started(sampler, scorer, learner, weights, voter)
        turns = Turns(sampler, learner, moves=self._gpus)
        return Started(
            ColocatedSampler(sampler, turns),
            scorer,
            ColocatedLearner(learner, turns),
            ColocatedWeights(weights, sampler, turns),
            voter,
        )

    async def _start_together(self, num_steps: Awaitable[int]) -> tuple[RolloutPool, LearnerGroup]:
        async def start_learner() -> LearnerGroup:
            return await self.start_learner(await num_steps)

        async with asyncio.TaskGroup() as tasks:
            sampler = tasks.create_task(self.start_sampler())
            learner = tasks.create_task(start_learner())
        return sampler.result(), learner.result()

    async def _start_in_turns(self, num_steps: Awaitable[int]) -> tuple[RolloutPool, LearnerGroup]:
        """Start the engine before the learner: it takes its share of a GPU's whole memory, and then frees it."""
        assert isinstance(self._config, RunConfig)
        if not self._gpus:
            sampler, learner = await self._start_together(num_steps)
            await sampler.sleep()
            return sampler, learner
        self._placement = placement = await reserve_pairs(self._config)
        sampler = await self.start_sampler(placement)
        await sampler.sleep()
        return sampler, await self.start_learner(await num_steps, placement)

    def _weight_sync(self, sampler: RolloutPool, learner: LearnerGroup) -> RayWeightSync | RayAdapterSync:
        timeout_s = self._config.deadlines.of_sync(has_gpus=self._gpus)
        if self._config.model.sends_adapters:
            return RayAdapterSync(sampler, learner, timeout_s)
        learner.prepare_weights()
        keep = isinstance(self._config, RunConfig) and self._config.weights.keep_kv_cache
        return RayWeightSync(sampler, learner, timeout_s, keep_kv_cache=keep)

    async def start_scorer(self) -> RewardPool | RewardPools:
        assert isinstance(self._config, RunConfig)
        start_s = self._config.deadlines.start_s
        with_environments = self._config.environment is not None

        async def start(name: str, config: RewardConfig) -> RewardPool:
            pool = await RewardPool.create(
                config, self._run_dir, name=name, start_timeout_s=start_s, with_environments=with_environments
            )
            pool.on_trouble = self._warn
            return self._opened(pool, "rewards" if name == SHARED_POOL else name)

        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(start(*one)) for one in self._config.reward_pools.items()]
        pools = [task.result() for task in started]
        self._scorer = pools[0] if len(pools) == 1 else RewardPools(self._config.reward, pools)
        return self._scorer

    async def start_voter(self) -> RewardPool | None:
        assert isinstance(self._config, RunConfig)
        votes = vote_config(self._config)
        if votes is None:
            return None
        pool = await RewardPool.create(
            votes, self._run_dir, name="votes", start_timeout_s=self._config.deadlines.start_s
        )
        return self._opened(pool, "votes")

    async def start_sampler(self, placement: Places | None = None) -> RolloutPool:
        """Start the rollout engines, and the environments that their episodes are played in."""
        async with asyncio.TaskGroup() as tasks:
            sampling = tasks.create_task(self._start_engines(placement))
            environments = tasks.create_task(self._start_environments())
        sampler = sampling.result()
        if (pool := environments.result()) is not None:
            sampler.use_environments(pool.members)
            pool.on_change = sampler.use_environments
        return sampler

    async def _start_environments(self) -> EnvironmentPool | None:
        assert isinstance(self._config, RunConfig)
        if self._config.environment is None:
            return None
        pool = await EnvironmentPool.create(
            self._config.environment,
            tuple(f for f in self._config.reward.functions if not f.built_in),
            self._run_dir,
            start_timeout_s=self._config.deadlines.start_s,
        )
        pool.on_trouble = self._warn
        self._environments = self._opened(pool, "environments")
        return pool

    async def _start_engines(self, placement: Places | None) -> RolloutPool:
        assert isinstance(self._config, RunConfig)
        self._phase("starting", "rollout: vLLM")
        pool = await RolloutPool.create(
            self._config, self._model, self._run_dir, has_gpus=self._gpus, placement=placement
        )
        pool.on_trouble = self._warn
        pool.lost_learner = lambda: self.lost_learner
        self._sampler = self._opened(pool, "rollout")
        return pool

    async def start_learner(
        self, num_steps: int, placement: Places | None = None, limit_s: float | None = None
    ) -> LearnerGroup:
        self._phase("starting", "learner: DeepSpeed")
        with self._learner_timeout.measured():
            await import_learning(self._config.deadlines.start_s)
            from actors.learner.group import LearnerGroup

            pool = await LearnerGroup.create(
                self._config,
                self._model,
                self._run_dir,
                has_gpus=self._gpus,
                num_steps=num_steps,
                placement=placement,
                limit_s=limit_s,
            )
        self._num_steps = num_steps
        self._learner = self._opened(pool, "learner")
        return pool

    async def start_learner_again(self) -> LearnerGroup:
        """Start new ranks for lost ones; ranks whose start hangs are restarted, as long as a start may take."""
        timeout = self._learner_timeout
        timeout.died()
        limit_s = timeout.again_s
        while True:
            try:
                return await self.start_learner(self._num_steps, self._placement, limit_s)
            except DeadlineError as e:
                if timeout.left_s <= 0:
                    raise
                self._warn(f"{e}\nLearners start once more")
                limit_s = timeout.doubled(limit_s)

    def _opened(self, pool: P, what: str) -> P:
        self._pools.append(pool)
        self._phase("started", what)
        return pool


async def _no_weights_yet() -> None:
    """The `RolloutPool.on_stale` while there is no learner; the pool asks again."""
