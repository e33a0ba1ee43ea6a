"""What a run asks for where its recipe leaves it open, over a table of machines."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from actors.machines import Machine, Node
from actors.placement_defaults import CHOSEN, fit_to, open_options, too_small, used, would_fit
from grpo_ray.config.loading import build, load_yaml, to_yaml
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from launch.run.placement import SEQS, fit_to_large_gpus, open_yaml
from tests.recipes import run_config

ONE_CORE = Machine((Node(1),))
TWO_CORES = Machine((Node(2),))
LAPTOP = Machine((Node(8),))
SERVER = Machine((Node(64),))
ONE_GPU = Machine((Node(8, 1),))
ONE_GPU_TWO_CORES = Machine((Node(2, 1),))
EIGHT_GPUS = Machine((Node(96, 8),))
EIGHT_GPUS_FEW_CORES = Machine((Node(8, 8),))
FOUR_NODES = Machine(tuple(Node(16, 4) for _ in range(4)))
HALF_TAKEN = Machine((Node(96, 8),), free={"GPU": 4, "CPU": 50})
MACHINES = [
    ONE_CORE,
    TWO_CORES,
    Machine((Node(3),)),
    Machine((Node(4),)),
    LAPTOP,
    SERVER,
    ONE_GPU,
    ONE_GPU_TWO_CORES,
    Machine((Node(1, 1),)),
    Machine((Node(16, 2),)),
    Machine((Node(24, 6),)),
    EIGHT_GPUS,
    EIGHT_GPUS_FEW_CORES,
    FOUR_NODES,
    HALF_TAKEN,
    Machine((Node(4), Node(2, 1), Node(2, 1))),
]


def chosen(machine: Machine, *overrides: str, kind: str = "grpo") -> tuple[Any, ...]:
    """(engines, learners, reward workers, CPUs of each of these, placement)."""
    c, _ = fit_to(machine, run_config(*overrides), kind)
    cpus = (c.rollout.num_cpus, c.learner.num_cpus, c.reward.num_cpus)
    return c.rollout.num_actors, c.learner.num_actors, c.reward.num_actors, *cpus, c.cluster.placement


@pytest.mark.parametrize(
    ("machine", "want"),
    [
        (ONE_CORE, (1, 1, 1, 0.5, 0.5, 0, "disaggregated")),
        (TWO_CORES, (1, 1, 1, 1, 1, 0, "disaggregated")),
        (Machine((Node(3),)), (1, 1, 1, 1, 1, 1, "disaggregated")),
        (LAPTOP, (2, 1, 2, 1, 1, 1, "disaggregated")),
        (SERVER, (8, 1, 8, 1, 1, 1, "disaggregated")),
        (Machine((Node(64),), cores=2), (1, 1, 1, 1, 1, 1, "disaggregated")),
        (ONE_GPU, (1, 1, 2, 1, 1, 1, "colocated")),
        (ONE_GPU_TWO_CORES, (1, 1, 1, 1, 1, 0, "colocated")),
        (EIGHT_GPUS, (8, 8, 8, 1, 1, 1, "colocated")),
        (EIGHT_GPUS_FEW_CORES, (8, 8, 2, 0.5, 0.5, 0, "colocated")),
        (FOUR_NODES, (16, 16, 8, 1, 1, 1, "colocated")),
        (HALF_TAKEN, (4, 4, 8, 1, 1, 1, "colocated")),
    ],
)
def test_workers_are_as_many_as_the_machine_has_room_for(machine: Machine, want: tuple[Any, ...]) -> None:
    assert chosen(machine) == want


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", ["grpo", "eval", "sample"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("algorithm.max_staleness=1",),
        ("prompts_per_step=2", "rollout.num_generations=2"),
        ("rollout.min_actors=1", "rollout.max_actors=2"),
        ("rollout.num_actors=1",),
        ("learner.num_actors=1",),
        ("reward.functions=[{name: accuracy, workers: {num_cpus: 0.25}}]",),
    ],
)
def test_every_recipe_that_leaves_room_fits_and_is_valid(
    machine: Machine, kind: str, overrides: tuple[str, ...]
) -> None:
    config = run_config(*overrides)
    found, _ = fit_to(machine, config, kind)
    assert too_small(machine, config, kind, found) is None
    again = build(RunConfig, found.model_dump(mode="json"), "the saved config")
    assert again == found
    assert open_options(again) == frozenset()
    assert fit_to(LAPTOP, again, kind)[0] == again
    for option in overrides:
        if option.endswith("num_actors=1"):
            assert getattr(found, option.split(".")[0]).num_actors == 1


@pytest.mark.parametrize("machine", MACHINES)
def test_what_a_recipe_names_is_kept(machine: Machine) -> None:
    named = run_config(*(f"{key}={value}" for key, value in WHOLE.items()))
    assert open_options(named) == frozenset()
    assert fit_to(machine, named, "grpo") == (named, {})


WHOLE = {
    "rollout.num_actors": 3,
    "learner.num_actors": 2,
    "reward.num_actors": 5,
    "rollout.num_cpus": 0.7,
    "learner.num_cpus": 2,
    "reward.num_cpus": 1,
    "cluster.placement": "disaggregated",
    "rollout.num_gpus": 1,
    "learner.num_gpus": 1,
    "rollout.gpu_memory_utilization": 0.5,
}


def test_every_option_that_is_chosen_is_in_the_table_above() -> None:
    assert set(WHOLE) == set(CHOSEN)


def test_options_that_are_named_shape_the_others() -> None:
    assert chosen(EIGHT_GPUS, "learner.num_actors=2")[:2] == (6, 2)
    assert chosen(EIGHT_GPUS, "learner.num_actors=2")[-1] == "disaggregated"
    assert chosen(EIGHT_GPUS, "rollout.num_actors=8")[:2] == (8, 8)
    assert chosen(EIGHT_GPUS, "rollout.num_actors=8")[-1] == "colocated"
    assert chosen(EIGHT_GPUS, "rollout.tensor_parallel_size=4")[:2] == (1, 4)
    assert chosen(EIGHT_GPUS, "algorithm.max_staleness=1")[:2] == (4, 4)
    assert chosen(EIGHT_GPUS, "cluster.placement=disaggregated")[:2] == (4, 4)
    assert chosen(EIGHT_GPUS, "cluster.placement=colocated", "learner.num_actors=4")[:2] == (4, 4)
    assert chosen(EIGHT_GPUS, kind="eval")[0] == 8
    assert chosen(EIGHT_GPUS, "rollout.tensor_parallel_size=2", kind="sample")[0] == 4


@pytest.mark.parametrize(
    ("overrides", "engines", "learners"),
    [
        ((), 4, 8),
        (("rollout.num_actors=2",), 2, 4),
        (("learner.num_actors=6",), 3, 6),
        (("rollout.num_actors=1", "learner.num_actors=2"), 1, 2),
        (("prompts_per_step=3",), 3, 6),
    ],
)
def test_engines_of_two_gpus_in_turns_are_half_as_many_as_learners(
    overrides: tuple[str, ...], engines: int, learners: int
) -> None:
    turns = ("rollout.tensor_parallel_size=2", "cluster.placement=colocated")
    assert chosen(EIGHT_GPUS, *turns, *overrides)[:2] == (engines, learners)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["eval", "sample", "replay"])
def test_a_run_of_one_role_has_whole_gpus_whatever_its_recipe_shares(kind: str, size: int) -> None:
    """Ray puts two halves on one GPU: two engines find no memory there, and NCCL takes no two ranks."""
    shared = run_config(
        f"rollout={{tensor_parallel_size: {size}, num_actors: {4 // size}}}",
        "learner.num_actors=4",
        "cluster.placement=colocated",
    )
    found, options = fit_to(EIGHT_GPUS, shared, kind)
    assert options["cluster.placement"] == "disaggregated"
    (wanted,) = (d for d in used(found, kind, gpus=True) if d.option != "reward")
    assert wanted.num_actors * wanted.num_gpus == 4
    assert fit_to(LAPTOP, shared, kind)[0].colocated


def test_a_replay_that_leaves_its_learners_open_gives_each_a_whole_gpu() -> None:
    found, _ = fit_to(EIGHT_GPUS, run_config(), "replay")
    (wanted,) = used(found, "replay", gpus=True)
    assert (wanted.num_actors, wanted.num_gpus) == (8, 1.0)


@pytest.mark.parametrize(("nodes", "fits"), [((4, 4), True), ((3, 3, 3), False), ((2, 2, 2, 2), False)])
def test_an_engine_in_turns_is_placed_where_one_node_has_all_its_gpus(nodes: tuple[int, ...], fits: bool) -> None:
    config = run_config(
        "rollout={tensor_parallel_size: 4, num_actors: 2}", "learner={num_actors: 8}", "cluster.placement=colocated"
    )
    machine = Machine(tuple(Node(64, gpus) for gpus in nodes))
    found, _ = fit_to(machine, config, "grpo")
    assert (too_small(machine, config, "grpo", found) is None) is fits


def test_one_gpu_is_shared_where_sampling_runs_ahead() -> None:
    found, _ = fit_to(ONE_GPU, run_config("algorithm.max_staleness=1"), "grpo")
    assert (found.rollout.num_gpus, found.learner.num_gpus, found.cluster.placement) == (0.5, 0.5, "disaggregated")
    assert found.rollout.gpu_memory_utilization < 0.5


def test_learners_of_a_sequence_are_a_whole_number_of_its_slices() -> None:
    config = run_config("learner.num_actors=4", "learner.sequence_parallel_size=4")
    rest = config.learner.model_copy()
    open_again = config.model_copy(update={"learner": rest})
    rest.model_fields_set.discard("num_actors")
    assert fit_to(Machine((Node(24, 6),)), open_again, "grpo")[0].learner.num_actors == 4


def test_supervised_learners_take_all_gpus_and_no_more_than_examples() -> None:
    data = {"model": {"tiny": {}}, "data": {"train": {"path": "rows.jsonl"}}}
    assert fit_to(EIGHT_GPUS, build(SftConfig, data, "test"), "sft")[0].learner.num_actors == 8
    few = build(SftConfig, data | {"examples_per_step": 2}, "test")
    assert fit_to(EIGHT_GPUS, few, "sft")[0].learner.num_actors == 2
    assert fit_to(LAPTOP, few, "sft")[1] == {"learner.num_actors": 1, "learner.num_cpus": 1.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.labels={zone: x}", "no node has the labels of rollout.labels {zone: x}"),
        ("learner.resources={a100: 1}", "no node has the a100 of learner.resources"),
    ],
)
@pytest.mark.parametrize("cpus", [1, 8])
def test_labels_and_resources_that_no_node_has_are_named_and_nothing_else(
    cpus: int, override: str, expected: str
) -> None:
    machine, config = Machine((Node(cpus),)), run_config(override)
    found, _ = fit_to(machine, config, "grpo")
    text = too_small(machine, config, "grpo", found)
    assert text is not None
    assert text.startswith(expected)
    assert "CPU" not in text


def test_nodes_without_the_labels_that_are_asked_for_do_not_count() -> None:
    machine = Machine((Node(16, 4, labels={"zone": "a"}), Node(16, 4, labels={"zone": "b"})))
    labels = ("rollout.labels={zone: a}", "learner.labels={zone: a}")
    assert chosen(machine, *labels)[:2] == (4, 4)


@pytest.mark.parametrize(
    ("machine", "overrides", "mend"),
    [
        (TWO_CORES, ("rollout.num_cpus=1", "learner.num_cpus=1", "reward.num_cpus=1"), {"reward.num_cpus": 0.0}),
        (ONE_CORE, ("rollout.num_cpus=1", "learner.num_cpus=1"), {"learner.num_cpus": 0.0}),
        (TWO_CORES, ("rollout.num_actors=3", "rollout.num_cpus=1"), {"rollout.num_actors": 1}),
        (TWO_CORES, ("rollout.num_actors=9",), {"rollout.num_actors": 1}),
        (TWO_CORES, ("learner.num_actors=3",), {"learner.num_actors": 1}),
        (TWO_CORES, ("learner.num_cpus=8",), {"learner.num_cpus": 1.0}),
        (LAPTOP, ("rollout.num_gpus=1",), {"rollout.num_gpus": None}),
        (ONE_GPU, ("learner.num_actors=2",), {"learner.num_actors": 1}),
        (EIGHT_GPUS, ("rollout.tensor_parallel_size=16",), {"rollout.tensor_parallel_size": 1}),
        (
            ONE_CORE,
            ("reward.functions=[{name: accuracy, workers: {num_cpus: 3}}]",),
            {"workers.num_cpus of the reward accuracy": 0},
        ),
    ],
)
def test_what_does_not_fit_is_told_with_the_options_that_would(
    machine: Machine, overrides: tuple[str, ...], mend: dict[str, Any]
) -> None:
    config = run_config(*overrides)
    found, _ = fit_to(machine, config, "grpo")
    told = too_small(machine, config, "grpo", found)
    assert told is not None
    assert would_fit(machine, config, "grpo") == mend
    assert all(key in told for key in mend)


def test_what_no_option_mends_is_still_told() -> None:
    config = run_config("rollout.resources={engines: 1}")
    told = too_small(TWO_CORES, config, "grpo", fit_to(TWO_CORES, config, "grpo")[0])
    assert told is not None
    assert "no node has the engines of rollout.resources" in told


def test_a_worker_that_no_single_node_holds_does_not_fit() -> None:
    config = run_config("learner.num_cpus=3")
    machine = Machine((Node(2), Node(2)))
    assert too_small(machine, config, "grpo", fit_to(machine, config, "grpo")[0]) is not None


def test_workers_that_are_not_started_take_nothing() -> None:
    found, choice = fit_to(ONE_CORE, run_config("learner.num_cpus=64"), "eval")
    assert too_small(ONE_CORE, found, "eval", found) is None
    assert not any(key.startswith("learner") for key in choice)
    assert [d.option for d in used(found, "eval", gpus=False)] == ["rollout", "reward"]


def test_a_recipe_for_another_machine_leaves_open_what_it_left_open() -> None:
    config = run_config("rollout.num_actors=2", "learner.num_cpus=1")
    data = yaml.safe_load(open_yaml(config))
    assert data["rollout"]["num_actors"] == 2
    assert "num_cpus" not in data["rollout"]
    assert open_options(build(RunConfig, data, "test")) == open_options(config)
    assert build(RunConfig, data, "test") == config


def test_a_saved_run_is_not_chosen_for_again(tmp_path: Any) -> None:
    found, _ = fit_to(EIGHT_GPUS, run_config(), "grpo")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(found))
    saved = build(RunConfig, load_yaml(path), "test")
    assert fit_to(TWO_CORES, saved, "grpo") == (saved, {})


def test_engines_of_large_gpus_sample_more_at_once_where_the_recipe_leaves_it_open() -> None:
    large = replace(EIGHT_GPUS, gpu_memory=80 << 30)
    found, chosen = fit_to_large_gpus(large, run_config(), {})
    assert found.rollout.max_num_seqs == 1024
    assert chosen == {SEQS: 1024}
    small = replace(EIGHT_GPUS, gpu_memory=48 << 30)
    for machine, config in (
        (EIGHT_GPUS, run_config()),
        (small, run_config()),
        (large, run_config("rollout.max_num_seqs=256")),
    ):
        found, chosen = fit_to_large_gpus(machine, config, {})
        assert found.rollout.max_num_seqs == 256
        assert chosen == {}
    assert "max_num_seqs" not in yaml.safe_load(open_yaml(run_config()))["rollout"]
    assert yaml.safe_load(open_yaml(run_config("rollout.max_num_seqs=99")))["rollout"]["max_num_seqs"] == 99
