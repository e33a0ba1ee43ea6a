"""Whose turn it is, over plain objects that say what they are asked."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.control.colocated import ColocatedLearner, ColocatedSampler, ColocatedWeights, Turns, check_colocated
from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError


class Told:
    """Answers every method with nothing, after having written it down."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> None:
            await asyncio.sleep(0)
            values = [a for a in (*args, *kwargs.values()) if isinstance(a, str | bool)]
            self._calls.append(" ".join([method, *map(str, values)]))

        return call

    def engines(self) -> list[str]:
        return ["rollout-0"]


class Setting:
    def __init__(self, *, moves: bool = True) -> None:
        self.calls: list[str] = []
        told: Any = Told(self.calls)
        turns = Turns(told, told, moves=moves)
        self.sampler = ColocatedSampler(told, turns)
        self.learner = ColocatedLearner(told, turns)
        self.weights = ColocatedWeights(told, told, turns)
        self.pool = told

    async def sample(self) -> None:
        request: Any = None
        await asyncio.gather(*(self.sampler.generate(request) for _ in range(3)))

    def take(self) -> list[str]:
        taken = self.calls[:]
        self.calls.clear()
        return taken


def test_the_device_changes_hands_twice_a_step_and_never_holds_both_whole() -> None:
    async def steps() -> None:
        s, batch = Setting(), object()
        await s.sample()
        assert s.take() == ["offload False", "wake", *["generate"] * 3]
        for _ in range(2):
            await s.sample()
            assert s.take() == ["generate"] * 3
            await s.learner.update(batch)  # type: ignore[arg-type]
            assert s.take() == ["sleep", "reload", "update"]
            await s.weights.sync(1)
            assert s.take() == ["offload True", "wake weights", "sync", "offload False", "wake kv_cache"]

    asyncio.run(steps())


def test_on_cpus_nothing_moves_and_there_are_turns_all_the_same() -> None:
    async def steps() -> None:
        s, batch = Setting(moves=False), object()
        await s.sample()
        assert s.take() == ["wake", *["generate"] * 3]
        for _ in range(2):
            await s.sample()
            await s.learner.update(batch)  # type: ignore[arg-type]
            assert s.take() == [*["generate"] * 3, "sleep", "update"]
            await s.weights.sync(1)
            assert s.take() == ["wake weights", "sync", "wake kv_cache"]

    asyncio.run(steps())


def test_learners_that_have_just_started_can_load_before_anything_is_sampled() -> None:
    async def steps() -> None:
        s = Setting()
        place: Any = None
        await s.learner.load(place)
        assert s.take() == ["load"]
        await s.weights.sync(1)
        assert s.take() == ["offload True", "wake weights", "sync", "offload False", "wake kv_cache"]

    asyncio.run(steps())


def test_samples_after_a_checkpoint_wake_the_engines_once() -> None:
    async def steps() -> None:
        s = Setting()
        await s.sample()
        s.take()
        place: Any = None
        await s.learner.hold(place, export=True)
        await s.learner.write(place)
        assert s.take() == ["sleep", "reload", "hold True", "write"]
        await s.sample()
        assert s.take() == ["offload False", "wake", "generate", "generate", "generate"]

    asyncio.run(steps())


def test_an_engine_that_was_restarted_gets_its_weights_from_a_learner_that_has_them_on_the_device() -> None:
    async def steps() -> None:
        s = Setting()
        await s.sample()
        s.take()
        await s.pool.on_stale()
        assert s.take() == [
            *("sleep", "reload", "offload True", "wake weights"),
            *("sync_stale", "offload False", "wake kv_cache"),
        ]
        await s.sample()
        assert s.take() == ["generate"] * 3

    asyncio.run(steps())


def test_a_failed_update_leaves_the_turn_with_the_learner() -> None:
    async def steps() -> None:
        s = Setting()
        with pytest.raises(ZeroDivisionError):
            async with s.learner._turns.learning():
                raise ZeroDivisionError
        s.take()
        place: Any = None
        await s.learner.load(place)
        assert s.take() == ["load"]

    asyncio.run(steps())


def config(**parts: dict[str, Any]) -> RunConfig:
    data: dict[str, Any] = {
        "model": {"tiny": {}},
        "data": {"train": {"path": "unused"}},
        "reward": {"functions": [{"name": "accuracy"}]},
        "cluster": {"placement": "colocated"},
    }
    return build(RunConfig, data | parts, "test")


@pytest.mark.parametrize(
    ("parts", "culprit"),
    [
        ({"rollout": {"tensor_parallel_size": 2}}, "rollout.tensor_parallel_size is 2"),
        ({"rollout": {"data_parallel_size": 2}}, "rollout.data_parallel_size is 2"),
        ({"rollout": {"num_actors": 2}}, "rollout.num_actors is 2; .* learner.num_actors, 1"),
        (
            {"rollout": {"tensor_parallel_size": 4, "num_actors": 2}, "learner": {"num_actors": 2}},
            "rollout.tensor_parallel_size is 4 and rollout.num_actors 2; .* use learner.num_actors 8",
        ),
        ({"rollout": {"num_gpus": 1}}, "rollout.num_gpus is 1.0 and learner.num_gpus None; .* leave both out"),
        ({"rollout": {"num_gpus": 0.6}, "learner": {"num_gpus": 0.6}}, "add up to 1 at most"),
        ({"learner": {"num_gpus": 0}}, "be above 0"),
        (
            {"rollout": {"tensor_parallel_size": 2, "num_gpus": 2}, "learner": {"num_actors": 2}},
            "rollout.num_gpus is 2.0 and learner.num_gpus None; .* leave both out",
        ),
    ],
)
def test_gpus_that_cannot_be_shared_are_refused(parts: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ConfigError, match=culprit):
        check_colocated(config(**parts), has_gpus=True)
    check_colocated(config(**parts), has_gpus=False)


@pytest.mark.parametrize(
    "parts",
    [
        {"rollout": {"tensor_parallel_size": 2}, "learner": {"num_actors": 2}},
        {"rollout": {"tensor_parallel_size": 4, "num_actors": 2}, "learner": {"num_actors": 8}},
        {"rollout": {"tensor_parallel_size": 2, "num_gpus": 0.6}, "learner": {"num_actors": 2, "num_gpus": 0.7}},
    ],
)
def test_an_engine_of_several_gpus_shares_them_with_as_many_learners(parts: dict[str, Any]) -> None:
    check_colocated(config(**parts), has_gpus=True)


def test_sampling_ahead_is_refused_where_they_take_turns() -> None:
    with pytest.raises(ConfigError, match=r"max_staleness is 1.*take turns.*disaggregated"):
        config(algorithm={"max_staleness": 1})
