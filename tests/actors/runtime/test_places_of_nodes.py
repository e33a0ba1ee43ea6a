"""Places of learner ranks in a cluster of several nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import groupby

import pytest
import ray
from ray.cluster_utils import Cluster

from actors.places import Places, placed, reserve_pairs, reserve_ranks
from actors.runtime import RayActors
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DeadlineError
from tests.recipes import run_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("three_nodes")]
LIMIT_S = 120.0


class Rank:
    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[None]:
    """A head without room, and three nodes with room for two ranks, or with three GPUs, each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for number in range(3):
        cluster.add_node(num_cpus=1, num_gpus=3, resources={"slot": 2}, labels={"number": str(number)})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    cluster.shutdown()


def nodes_of(learner: LearnerConfig, places: Places | None) -> list[str]:
    actors = [
        RayActors().start(Rank, num_cpus=0, num_gpus=0, **placed(learner, places, rank))
        for rank in range(learner.num_actors)
    ]
    nodes: list[str] = ray.get([a.node.remote() for a in actors], timeout=LIMIT_S)
    for actor in actors:
        ray.kill(actor)
    return nodes


def test_ranks_are_on_as_few_nodes_as_hold_them_and_neighbours_side_by_side() -> None:
    learner = LearnerConfig.model_validate({"num_actors": 4, "num_cpus": 0, "resources": {"slot": 1}})
    for _ in range(3):
        places = asyncio.run(reserve_ranks(learner, 0, LIMIT_S))
        assert places is not None
        nodes = nodes_of(learner, places)
        assert len(set(nodes)) == 2
        assert [len(list(run)) for _, run in groupby(nodes)] == [2, 2]
        # All six are free for the next again.
        places.remove()


def test_places_are_on_nodes_with_the_labels_or_are_told_to_be_missing() -> None:
    learner = LearnerConfig.model_validate(
        {"num_actors": 2, "num_cpus": 0, "resources": {"slot": 1}, "labels": {"number": "2"}}
    )
    places = asyncio.run(reserve_ranks(learner, 0, LIMIT_S))
    assert places is not None
    (node,) = set(nodes_of(learner, places))
    (labels,) = [n["Labels"] for n in ray.nodes() if n["NodeID"] == node]
    assert labels["number"] == "2"
    with pytest.raises(DeadlineError, match=r"no room for the learners within 0\.5 s, 2 x .*'slot': 1.*'number': '2'"):
        asyncio.run(reserve_ranks(learner, 0, 0.5))
    places.remove()
    again = asyncio.run(reserve_ranks(learner, 0, LIMIT_S))
    assert again is not None
    again.remove()


def test_the_gpus_of_an_engine_are_on_one_node_however_many_are_free_on_others() -> None:
    def config(engines: int, start_s: float) -> RunConfig:
        return run_config(
            f"rollout={{num_actors: {engines}, tensor_parallel_size: 2, num_cpus: 0}}",
            f"learner={{num_actors: {2 * engines}, num_cpus: 0}}",
            f"deadlines.start_s={start_s}",
            "cluster.placement=colocated",
        )

    asked = config(3, LIMIT_S)
    places = asyncio.run(reserve_pairs(asked))
    nodes = nodes_of(asked.learner, places)
    assert nodes[::2] == nodes[1::2]
    assert len(set(nodes)) == 3
    places.remove()
    # Three GPUs are left over, each on another node.
    with pytest.raises(DeadlineError, match=r"4 x {'GPU': 2\.0}, each on one node"):
        asyncio.run(reserve_pairs(config(4, 1.0)))
