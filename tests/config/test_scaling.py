"""How many workers a run has: what may be asked for, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from grpo_ray.config.loading import build, to_yaml
from grpo_ray.config.scaling import (
    PATIENCE,
    Load,
    bounds,
    change,
    counts,
    decide,
    load_of,
    parse_counts,
    record,
    rescaled,
)
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError


def config(**sections: Any) -> RunConfig:
    data = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "unused.jsonl"}, "max_prompt_length": 56},
        "reward": {"functions": [{"name": "accuracy"}], "num_actors": 2},
    }
    return build(RunConfig, {**data, **sections}, "test")


def test_environments_scale_where_there_are_any() -> None:
    before = config(environment={"name": "my_game.Game", "num_actors": 2})
    after = rescaled(before, parse_counts(["environment=5"]))
    assert counts(before) == {"rollout": 1, "reward": 2, "environment": 2, "learner": 1}
    assert counts(after)["environment"] == 5
    assert "environment" not in counts(config())
    with pytest.raises(ConfigError, match="no environments to scale"):
        rescaled(config(), {"environment": 2})


def test_words_become_numbers_of_workers() -> None:
    assert parse_counts(["rollout=4", "reward=16", "learner=2"]) == {"rollout": 4, "reward": 16, "learner": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "scale what"),
        (["rollout"], "'rollout' is not ROLE=NUMBER"),
        (["rollouts=2"], "a role of rollout, reward, environment, learner"),
        (["rollout=0"], "1 or more"),
        (["rollout=-1"], "1 or more"),
        (["rollout=1.5"], "1 or more"),
        (["rollout=\u00b2"], "1 or more"),
        (["reward=2", "reward=3"], "reward is given twice"),
    ],
)
def test_other_words_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_counts(words)


def test_only_the_numbers_change() -> None:
    before = config()
    after = rescaled(before, {"rollout": 3, "learner": 2})
    assert counts(after) == {"rollout": 3, "reward": 2, "learner": 2}
    assert rescaled(after, {"rollout": 1, "learner": 1}) == before
    assert change(counts(before), {"rollout": 3, "reward": 2}) == "rollout 1 -> 3, reward stays 2"


def test_what_a_config_can_not_have_can_not_be_asked_for() -> None:
    shared = config(learner={"num_actors": 2, "sequence_parallel_size": 2})
    assert rescaled(shared, {"learner": 4}).learner.data_parallel_size == 2
    with pytest.raises(
        ConfigError, match=r"learner.num_actors \(3\) is not a multiple of learner.sequence_parallel_size \(2\)"
    ):
        rescaled(shared, {"learner": 3})
    few = config(prompts_per_step=1, rollout={"num_generations": 2})
    with pytest.raises(ConfigError, match="is more than the 2 samples of a step"):
        rescaled(few, {"learner": 3})


def test_pairs_that_share_devices_stay_as_they_are() -> None:
    pairs = config(cluster={"placement": "colocated"})
    assert counts(rescaled(pairs, {"reward": 5, "rollout": 1}))["reward"] == 5
    with pytest.raises(ConfigError, match="take turns on each device, so rollout and learner can't be scaled"):
        rescaled(pairs, {"reward": 5, "rollout": 2, "learner": 2})


def test_a_runs_config_keeps_the_numbers_and_all_else(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config(learner={"env": {"HF_TOKEN": "${HF_TOKEN}"}})))
    before = yaml.safe_load(path.read_text())
    record(path, {"rollout": 3, "reward": 2, "learner": 2})
    after = yaml.safe_load(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert (after["rollout"].pop("num_actors"), after["learner"].pop("num_actors")) == (3, 2)
    assert (before["rollout"].pop("num_actors"), before["learner"].pop("num_actors")) == (1, 1)
    assert after == before


SHORT = Load(busy=0.6, wait_fraction=0.6, waiting=9)
"""On-policy: they work whenever they are waited for, and that is most of the step."""
SLACK = Load(busy=0.1, wait_fraction=0.0, waiting=0)
FINE = Load(busy=0.9, wait_fraction=0.1, waiting=4)


def test_workers_that_are_waited_for_become_more_and_idle_ones_fewer() -> None:
    assert decide(2, 1, 8, [SHORT] * PATIENCE) == 3
    assert decide(2, 1, 8, [SLACK] * PATIENCE) == 1
    assert decide(16, 1, 64, [SHORT] * PATIENCE) == 20
    assert decide(16, 1, 64, [SLACK] * PATIENCE) == 12


@pytest.mark.parametrize("load", [SHORT, SLACK])
def test_a_few_steps_or_one_that_differs_change_nothing(load: Load) -> None:
    assert decide(2, 1, 8, [load] * (PATIENCE - 1)) == 2
    assert decide(2, 1, 8, [load] * 9 + [FINE, load]) == 2
    assert decide(2, 1, 8, [FINE] * 9) == 2


def test_the_bounds_hold() -> None:
    assert decide(8, 2, 8, [SHORT] * PATIENCE) == 8
    assert decide(7, 2, 9, [SHORT] * PATIENCE) == 8
    assert decide(2, 2, 8, [SLACK] * PATIENCE) == 2
    assert decide(2, 2, 2, [SHORT] * PATIENCE) == decide(2, 2, 2, [SLACK] * PATIENCE) == 2


@pytest.mark.parametrize(
    "load",
    [
        Load(busy=0.3, wait_fraction=0.6, waiting=9),  # All but one wait for the longest sample.
        Load(
            busy=0.6, wait_fraction=0.6, waiting=0
        ),  # Nothing waits for a place: each sample would be as slow elsewhere.
        Load(busy=1.0, wait_fraction=0.1, waiting=9),  # The learners are the bottleneck.
    ],
)
def test_more_workers_are_not_asked_for_where_they_would_not_help(load: Load) -> None:
    assert decide(2, 1, 8, [load] * 9) == 2


@pytest.mark.parametrize("waiting", [1, 9])
@pytest.mark.parametrize("place", range(PATIENCE))
def test_workers_for_whom_samples_wait_are_not_made_fewer(waiting: int, place: int) -> None:
    """However idle they look: what waits comes at once, or is too large for the others."""
    loads = [SLACK] * PATIENCE
    loads[place] = Load(busy=0.0, wait_fraction=0.0, waiting=waiting)
    assert decide(4, 1, 8, loads) == 4
    assert decide(4, 1, 8, [Load(busy=0.05, wait_fraction=0.0, waiting=waiting)] * 9) == 4


@given(st.integers(1, 200), st.floats(0.001, 0.999), st.integers(0, 9), st.integers(0, 9))
def test_what_was_changed_is_not_changed_back(now: int, work: float, waiting: int, then: int) -> None:
    """On-policy: a step is what the workers do, shared by them, and the rest, one after the other."""

    def load(number: int, queue: int) -> Load:
        working_s = work * now / number
        return Load(working_s / (1 - work + working_s), working_s / (1 - work + working_s), queue)

    after = decide(now, 1, 1000, [load(now, waiting)] * PATIENCE)
    again = decide(after, 1, 1000, [load(after, then)] * PATIENCE)
    assert after <= now or again >= after
    assert after >= now or again <= after


def test_the_load_of_a_role_is_in_the_metrics_of_a_step() -> None:
    metrics = {"time/step": 4.0, "time/rollout": 3.0, "reward/alone_s": 1.0, "busy/rollout": 0.7, "busy/reward": 0.4}
    assert load_of("rollout", metrics, 5) == Load(0.7, 0.75, 5)
    assert load_of("reward", metrics, 2) == Load(0.4, 0.25, 2)
    assert load_of("rollout", {"time/step": 4.0}, 5) is None


def test_bounds_are_both_given_and_hold_the_number_that_a_run_begins_with() -> None:
    free = config(rollout={"num_actors": 2, "min_actors": 1, "max_actors": 4})
    assert (bounds(free, "rollout"), bounds(free, "reward")) == ((1, 4), (2, 2))
    assert rescaled(free, {"rollout": 4}).rollout.num_actors == 4
    with pytest.raises(ConfigError, match=r"rollout.num_actors is 5, outside of .* 1 to 4"):
        rescaled(free, {"rollout": 5})
    with pytest.raises(ConfigError, match=r"give both of rollout.min_actors and rollout.max_actors"):
        config(rollout={"min_actors": 1})
    with pytest.raises(ConfigError, match=r"placement colocated there is one for each learner"):
        config(rollout={"min_actors": 1, "max_actors": 2}, cluster={"placement": "colocated"})
