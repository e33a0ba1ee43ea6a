"""Places of learner ranks on one node; test_places_of_nodes.py has several."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.learner.group import LearnerGroup
from actors.places import placed, reserve_pairs, reserve_ranks, side_by_side
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.errors import DeadlineError
from tests.actors.learner.test_learner import make_config

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
LIMIT_S = 120.0


@pytest.mark.parametrize(
    ("nodes", "order"),
    [
        ({}, ()),
        ({0: "a", 1: "a"}, (0, 1)),
        ({0: "b", 1: "a", 2: "b", 3: "a"}, (0, 2, 1, 3)),
        ({2: "a", 0: "c", 1: "b", 4: "b", 3: "c"}, (0, 3, 1, 4, 2)),
    ],
)
def test_neighbours_are_on_one_node_wherever_ray_put_the_bundles(nodes: dict[int, str], order: tuple[int, ...]) -> None:
    assert side_by_side(nodes) == order


def states() -> list[str]:
    return sorted(table["state"] for table in ray.util.placement_group_table().values())


@pytest.mark.usefixtures("local_ray")
def test_ranks_that_replace_others_get_their_places(tiny_model: Path, tmp_path: Path) -> None:
    """There is room for one group at a time."""
    config = make_config(tiny_model, ranks=2, stage=1, learner={"num_cpus": 3})

    async def twice() -> list[list[Any]]:
        seen = []
        for _ in range(2):
            group = await LearnerGroup.create(config, str(tiny_model), str(tmp_path))
            tables = [t for t in ray.util.placement_group_table().values() if t["state"] == "CREATED"]
            seen.append([t["bundles"] for t in tables])
            await group.close()
        return seen

    assert asyncio.run(twice()) == [[{0: {"CPU": 3.0}, 1: {"CPU": 3.0}}]] * 2
    assert set(states()) == {"REMOVED"}


@pytest.mark.usefixtures("local_ray")
def test_ranks_without_room_are_told_and_leave_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model, ranks=2, stage=1, learner={"num_cpus": 5})
    with pytest.raises(DeadlineError, match="no room for the learners within 1 s"):
        asyncio.run(LearnerGroup.create(config, str(tiny_model), str(tmp_path), limit_s=1.0))
    assert "PENDING" not in states()


@pytest.mark.usefixtures("local_ray")
def test_one_rank_or_ranks_that_ask_for_nothing_need_no_places() -> None:
    alone = LearnerConfig.model_validate({"num_actors": 1, "num_cpus": 1})
    free = LearnerConfig.model_validate({"num_actors": 2, "num_cpus": 0})
    assert asyncio.run(reserve_ranks(alone, 1.0, LIMIT_S)) is None
    assert asyncio.run(reserve_ranks(free, 0.0, LIMIT_S)) is None
    assert placed(free) == {}


@pytest.mark.usefixtures("local_ray")
def test_an_engine_and_its_learner_rank_ask_for_one_gpu_together(tiny_model: Path) -> None:
    from tests.actors.rollout.test_rollout import run_config

    config = run_config(
        tiny_model,
        cluster={"placement": "colocated"},
        rollout={"num_actors": 2, "num_cpus": 0.5, "max_completion_length": 64},
        learner={"num_actors": 2, "num_cpus": 0.25},
        deadlines={"start_s": 0.5},
    )
    with pytest.raises(DeadlineError, match=r"engines and learners within 0\.5 s, 2 x {'GPU': 1\.0, 'CPU': 0\.75}"):
        asyncio.run(reserve_pairs(config))
