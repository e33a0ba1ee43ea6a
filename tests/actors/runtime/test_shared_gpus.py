"""Engines of several GPUs in turns with a learner rank on each, with GPUs that Ray counts and this machine does not have."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.cluster import gpus_per_engine, gpus_per_learner
from actors.devices import SharedGpus, given_gpus
from actors.places import Places, placed, reserve_pairs
from actors.rollout.actor import RolloutActor
from actors.rollout.engine import RolloutEngineKind
from actors.runtime import RayActors, own_process
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DeadlineError
from tests.actors.rollout.test_rollout import run_config

pytestmark = pytest.mark.timeout(600)
LIMIT_S = 300.0
OF_NODE = ["4", "5", "6", "7"]
"""The GPUs that the node may use of its machine's."""


@pytest.fixture(scope="module")
def ray_with_four_gpus() -> Iterator[None]:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(OF_NODE)
    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.environ.pop("CUDA_VISIBLE_DEVICES")
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


class Spy:
    """An async actor, as engines are, that says which GPUs its process has: those that Ray gave it, or those that it shares."""

    def __init__(self, run_dir: str, name: str, shared: SharedGpus | None) -> None:
        own_process(run_dir, name)
        if shared is not None:
            shared.take()

    async def sees(self) -> tuple[list[str], list[str], int]:
        """The GPUs that this process sees, those that its children see, and how many it believes to have been given."""
        command = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], end='')"]
        of_child = subprocess.check_output(command, text=True)
        return os.environ["CUDA_VISIBLE_DEVICES"].split(","), of_child.split(","), given_gpus()


class Spies(RayActors):
    """Starts a spy where a run starts an engine."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir

    def start(self, actor: type, *args: Any, **options: Any) -> Any:
        assert actor is RolloutActor
        options.pop("runtime_env")
        shared = next((arg for arg in args if isinstance(arg, SharedGpus)), None)
        return super().start(Spy, self._run_dir, "engine", shared, **options)


class Shared:
    """The places of a run's engines and learner ranks, and spies in them."""

    def __init__(self, config: RunConfig, run_dir: Path, places: Places) -> None:
        self.config = config
        self._run_dir = str(run_dir)
        self._places = places
        self._kind = RolloutEngineKind(
            config, "none", self._run_dir, has_gpus=True, source=Spies(self._run_dir), placement=places
        )

    def engine(self, index: int) -> Any:
        return self._kind.launch(self._kind.make(index))

    def learner(self, rank: int) -> Any:
        learner = self.config.learner
        options: dict[str, Any] = {"num_cpus": learner.num_cpus, "num_gpus": gpus_per_learner(self.config, True)}
        return RayActors().start(Spy, self._run_dir, "learner", None, **options, **placed(learner, self._places, rank))


def seen(*spies: Any) -> list[list[str]]:
    found = ray.get([spy.sees.remote() for spy in spies], timeout=LIMIT_S)
    for own, of_child, number in found:
        assert own == of_child
        assert number == len(own)
    return [own for own, _, _ in found]


def shared_by(engines: int, size: int, **rollout: Any) -> RunConfig:
    return run_config(
        "none",
        cluster={"placement": "colocated"},
        rollout={
            "num_actors": engines,
            "tensor_parallel_size": size,
            "num_cpus": 0.5,
            "max_completion_length": 64,
            **rollout,
        },
        learner={"num_actors": engines * size, "num_cpus": 0.25},
        deadlines={"start_s": LIMIT_S},
    )


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shared]:
    size: int = request.param
    config = shared_by(4 // size, size)
    places = asyncio.run(reserve_pairs(config))
    yield Shared(config, tmp_path, places)
    places.remove()


@pytest.mark.usefixtures("ray_with_four_gpus")
def test_an_engine_sees_the_gpus_of_its_learner_ranks_before_they_start_and_when_it_starts_again(
    shared: Shared,
) -> None:
    size = shared.config.rollout.engine_size
    engines = [shared.engine(index) for index in range(4 // size)]
    of_engines = seen(*engines)
    of_ranks = [gpu for (gpu,) in seen(*[shared.learner(rank) for rank in range(4)])]
    assert sorted(of_ranks) == OF_NODE
    assert of_engines == [of_ranks[start : start + size] for start in range(0, 4, size)]
    ray.kill(engines[-1])
    assert seen(shared.engine(len(engines) - 1)) == of_engines[-1:]


@pytest.mark.usefixtures("ray_with_four_gpus")
def test_ray_counts_as_many_gpus_for_both_kinds_as_there_are() -> None:
    for size in (1, 2, 4):
        config = shared_by(4 // size, size)
        assert gpus_per_engine(config, True) == 0.5 * size
        assert 4 // size * gpus_per_engine(config, True) + 4 * gpus_per_learner(config, True) == 4


@pytest.mark.usefixtures("ray_with_four_gpus")
def test_engines_without_room_are_told_what_each_takes_and_leave_nothing_behind() -> None:
    config = shared_by(3, 2)
    short = config.model_copy(update={"deadlines": config.deadlines.model_copy(update={"start_s": 1.0})})
    told = r"engines and learners within 1 s, 3 x {'GPU': 2\.0, 'CPU': 1\.0}, each on one node; "
    with pytest.raises(DeadlineError, match=told):
        asyncio.run(reserve_pairs(short))
    groups = ray.util.placement_group_table().values()
    assert {"PENDING", "CREATED"}.isdisjoint(table["state"] for table in groups)
