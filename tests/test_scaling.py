"""How many workers a run has: what may be asked for, and where it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ray.config import RunConfig, build, to_yaml
from grpo_ray.errors import ConfigError
from grpo_ray.scaling import change, counts, parse_counts, record, rescaled


def config(**sections: Any) -> RunConfig:
    data = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "unused.jsonl"}, "max_prompt_length": 56},
        "reward": {"functions": [{"name": "accuracy"}], "num_actors": 2},
    }
    return build(RunConfig, {**data, **sections}, "test")


def test_words_become_numbers_of_workers() -> None:
    assert parse_counts(["rollout=4", "reward=16", "learner=2"]) == {"rollout": 4, "reward": 16, "learner": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "scale what"),
        (["rollout"], "'rollout' is not ROLE=NUMBER"),
        (["rollouts=2"], "a role of rollout, reward, learner"),
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
