"""The schema: every bad input is refused with a message that names it and the mend."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from grpo_ray.config import RunConfig, SftConfig, all_keys, build, deep_merge, load_yaml, parse_overrides, to_yaml
from grpo_ray.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "model": {"tiny": {}},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "accuracy"}]},
}


def make(*overrides: str) -> RunConfig:
    return build(RunConfig, deep_merge(MINIMAL, parse_overrides(list(overrides))), "recipe test")


def test_overrides_reach_their_place_with_their_type():
    config = make(
        "learner.zero_stage=3", "learner.learning_rate=1e-5", "rollout.stop=['</answer>']", "model.dtype=float32"
    )
    assert config.learner.zero_stage == 3
    assert config.learner.learning_rate == 1e-5
    assert config.rollout.stop == ("</answer>",)


def test_scientific_notation_in_a_recipe_is_a_number(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "learner: {learning_rate: 3e-6}\n")
    assert build(RunConfig, load_yaml(path), "r").learner.learning_rate == 3e-6


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.zero_stge=3", "learner.zero_stge: unknown key; did you mean learner.zero_stage?"),
        ("learning_rate=1e-5", "did you mean learner.learning_rate?"),
        ("rollout.num_generations=1", "a group of one has no baseline"),
        ("learner.zero_stage=5", "learner.zero_stage"),
        ("rollout.num_actors=0", "rollout.num_actors"),
        ("model.path=somewhere", "exactly one of model.path and model.tiny"),
        ("reward.functions=[]", "reward.functions is empty"),
        ("eval.accuracy=other", "none of reward.functions"),
        ("learner.zero_stage=0", "no fp32 master weights"),
        ("learner.micro_batch_tokens=600", "can't hold one sample of up to 1024 tokens"),
        ("algorithm.num_mini_batches=64", "a mini-batch holds at least one group"),
        ("algorithm.max_staleness=2", "not built yet"),
        ("learner.num_actors=300", "more than the 256 samples"),
        ("learner.offload_params=true", "needs zero_stage 3"),
    ],
)
def test_bad_values_are_named_with_the_mend(override, expected):
    with pytest.raises(ConfigError) as e:
        make(override)
    assert expected in str(e.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as e:
        make("learner.zero_stge=3", "rollout.top_p=2", "seed=x")
    assert str(e.value).count("\n  - ") == 3


@pytest.mark.parametrize("item", ["learner.zero_stage", "=3", "a.b=[1"])
def test_a_malformed_override_is_named(item):
    with pytest.raises(ConfigError, match=r"override"):
        parse_overrides([item])


def test_a_resolved_config_reads_back_as_itself():
    config = make("rollout.top_p=0.9", "reward.functions=[{name: accuracy, weight: 0.5, args: {a: 1}}]")
    again = build(RunConfig, yaml.safe_load(to_yaml(config)), "again")
    assert again == config


def test_held_out_data_are_one_source_or_several_by_name():
    assert make().data.eval_sets == {}
    assert list(make("data.eval.path=a.jsonl").data.eval_sets) == [""]
    several = make("data.eval={math: {path: a.jsonl}, aime: {path: b.jsonl, limit: 3}}")
    assert {name: s.path for name, s in several.data.eval_sets.items()} == {"math": "a.jsonl", "aime": "b.jsonl"}
    assert build(RunConfig, yaml.safe_load(to_yaml(several)), "again") == several


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.eval={pth: a.jsonl}", "data.eval.pth: unknown key; did you mean data.eval.path?"),
        ("data.eval={math: {pth: a.jsonl}}", "data.eval.math.pth: unknown key; did you mean data.eval.math.path?"),
        ("data.eval={a/b: {path: a.jsonl}}", "data.eval.a/b"),
        ("data.eval=3", "data.eval"),
    ],
)
def test_bad_held_out_data_are_named_without_the_schemas_own_words(override, expected):
    with pytest.raises(ConfigError) as e:
        make(override)
    assert expected in str(e.value)
    assert "<" not in str(e.value)


def test_every_key_of_the_schema_can_be_overridden_by_its_dotted_name():
    keys = all_keys(RunConfig)
    assert {"learner.zero_stage", "reward.on_failure.retries", "data.train.path"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_sft_refuses_a_micro_batch_that_holds_no_example():
    data = {"model": {"tiny": {}}, "data": {"train": {"path": "x"}}, "max_length": 20000}
    with pytest.raises(ConfigError, match="max_length"):
        build(SftConfig, data, "r")
