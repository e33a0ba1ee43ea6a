"""Options that do nothing: every option of the schema has its commands, and what is idle is told or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.data import DataSource
from grpo_ray.config.effects import (
    COMMANDS_OF,
    WHERE,
    about_context,
    check_context,
    not_looked_at,
    without_effect,
    without_gpu,
)
from grpo_ray.config.loading import all_keys, build, deep_merge, parse_overrides
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.data.sources import load_table
from grpo_ray.errors import ConfigError, DataError
from launch.check.command import check_recipe
from launch.pipeline.stages import load_plan
from launch.program import runnable
from launch.run.effects import check_effects, tell_idle_of_pipeline
from launch.run.recipe import COMMANDS, SCHEMAS, kind_of, load_recipe
from tests.recipes import RL, run_config

SUPERVISED: dict[str, Any] = {"model": {"tiny": {}}, "data": {"train": {"path": "rows.jsonl"}}}


PAIRS = {**SUPERVISED, "max_length": 128}
KEPT = {"path": "a", "keep_per_prompt": None, "prefer": "random"}
ROOT = Path(__file__).parents[2]
RECIPES = [p.relative_to(ROOT) for folder in ("launch/recipes", "tests/bench") for p in (ROOT / folder).glob("*.yaml")]


def supervised(schema: type[SftConfig], *overrides: str) -> SftConfig:
    return build(schema, deep_merge(SUPERVISED, parse_overrides(list(overrides))), "r")


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_option_of_the_schema_says_in_which_commands_it_has_an_effect(kind: str) -> None:
    schema = SCHEMAS[kind]
    commands = {COMMANDS[kind]} | ({"sample", "eval"} if schema is RunConfig else set())
    for key in all_keys(schema):
        if key in WHERE:
            continue
        assert key in COMMANDS_OF, f"{key} is new: enter it in grpo_ray.config.effects.WHERE"
        if schema is RunConfig:
            assert COMMANDS_OF[key] & commands, f"{key} does nothing in any command that takes it"


def test_options_that_a_command_does_not_look_at_are_found_wherever_they_stand() -> None:
    sections = [
        "num_steps=3",
        "algorithm=dapo",
        "learner.zero_stage=1",
        "critic={}",
        "checkpoint.keep=3",
        "data.shuffle=no",
    ]
    config = run_config(*sections, "tracking.wandb=true", "rollout.temperature=0.6", "model.lora={r: 4}", "name=x")
    found = set(not_looked_at(config, "eval"))
    assert {"num_steps", "algorithm.preset", "learner.zero_stage", "checkpoint.keep", "data.shuffle", "name"} <= found
    assert {"tracking.wandb", "rollout.temperature", "model.lora", "model.lora.r"} <= found
    assert "name" not in not_looked_at(config, "sample")
    assert not_looked_at(config, "train") == {}
    assert not_looked_at(run_config(), "eval") == {}


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("eval", "name=x", "name: `grpo-ray eval` does not look at it"),
        ("eval", "num_steps=3", "num_steps"),
        ("eval", "rollout.temperature=0.6", "it is eval.temperature there"),
        ("eval", "rollout.top_p=0.9", "it is eval.top_p there"),
        ("eval", "rollout.top_k=5", "rollout.top_k"),
        ("eval", "sample.num_samples=2", "sample.num_samples"),
        ("eval", "learner={zero_stage: 1}", "learner.zero_stage"),
        ("eval", "data.exclude_eval=false", "data.exclude_eval"),
        ("eval", "algorithm=dapo", "algorithm.preset"),
        ("sample", "rollout.num_generations=4", "it is sample.num_samples there"),
        ("sample", "data.shuffle=false", "data.shuffle"),
        ("sample", "eval.temperature=1", "eval.temperature"),
        ("sample", "tracking.wandb=true", "tracking.wandb"),
        ("sample", "model.lora={}", "model.lora"),
        ("train", "sample.temperature=0.5", "sample.temperature"),
        ("sft", "data.max_prompt_length=64", "data.max_prompt_length"),
        ("sft", "learner.overlap=false", "learner.overlap"),
        ("sft", "learner.skip_no_signal=false", "learner.skip_no_signal"),
        ("sft", "learner.share_prompts=false", "learner.share_prompts"),
        ("sft", "tracking.rollouts=false", "tracking.rollouts"),
        ("sft", "cluster.placement=colocated", "cluster.placement"),
        ("sft", "deadlines.sample_s=3", "deadlines.sample_s"),
        ("dpo", "data.max_prompt_length=64", "data.max_prompt_length"),
        ("reward-model", "cluster.placement=colocated", "cluster.placement"),
    ],
)
def test_an_option_typed_for_a_command_that_does_not_look_at_it_is_refused(
    command: str, override: str, expected: str
) -> None:
    schemas = {"sft": SftConfig, "dpo": DpoConfig, "reward-model": RewardModelConfig}
    needed = "rollout.max_completion_length=64"
    config = supervised(schemas[command], override) if command in schemas else run_config(override, needed)
    with pytest.raises(ConfigError) as e:
        check_effects(config, command, [override])
    assert expected in str(e.value)


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["num_steps=3", "num_epochs=2"], "num_epochs", "num_steps is given (3)"),
        (["num_steps=3", "data.last_batch=drop"], "data.last_batch", "num_steps is given (3)"),
        (["num_steps=3", "reward.functions=[{name: accuracy, from_step: 3}]"], "reward.functions", "num_steps is 3"),
        (["learner.min_lr_ratio=0.2"], "learner.min_lr_ratio", "cosine_with_min_lr"),
        (["learner.packing=false", "learner.share_prompts=false"], "learner.share_prompts", "packing"),
        (["learner.forward=plain", "learner.share_prompts=false"], "learner.share_prompts", "on the plain path"),
        (["learner.forward=plain", "learner.packing=false"], "learner.packing", "every sequence is padded"),
        (["tracking.project=x"], "tracking.project", "both are off"),
        (["cluster.address=auto", "cluster.num_cpus=2"], "cluster.num_cpus", "cluster.address"),
        (["model.trust_remote_code=true"], "model.trust_remote_code", "tiny"),
        (["data.exclude_eval=false"], "data.exclude_eval", "no data.eval"),
        (["eval.num_samples=4", "eval.temperature=1"], "eval.num_samples", "no data.eval"),
        (["eval.every_steps=4"], "eval.every_steps", "no data.eval"),
        (["eval.threshold=0.5"], "eval.threshold", "no data.eval"),
        (["data.eval.path=a.jsonl", "eval.top_p=0.9"], "eval.top_p", "eval.temperature is 0"),
        (["data.eval.path=a.jsonl", "eval.num_samples=4"], "eval.num_samples", "are the same"),
        (["rollout.kv_cache_gb=1", "rollout.gpu_memory_utilization=0.5"], "rollout.gpu_memory_utilization", "kv_cache_gb"),
        (
            ["reward.functions=[{name: accuracy, workers: {}}]", "reward.num_actors=4"],
            "reward.num_actors",
            "workers of its own",
        ),
        (["reward.functions=[{name: accuracy, workers: {}}]", "reward.unit=group"], "reward.unit", "workers of its own"),
        (["reward.on_failure.value=1"], "reward.on_failure.value", "action"),
        (["algorithm.advantage=dr_grpo", "algorithm.std_eps=0.1"], "algorithm.std_eps", "no standard deviation"),
        (["algorithm=rloo", "algorithm.std_ddof=0"], "algorithm.std_ddof", "no standard deviation"),
        (["algorithm.epsilon_high=0.3"], "algorithm.epsilon_high", "the ratio is 1"),
        (["algorithm.dual_clip_c=3"], "algorithm.dual_clip_c", "the ratio is 1"),
    ],
)  # fmt: skip
def test_options_that_do_nothing_beside_the_others_are_told(
    overrides: list[str], key: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config("rollout.max_completion_length=64", *overrides)
    assert expected in without_effect(config, "train")[key]
    check_effects(config, "train", overrides)
    assert f"{key}" in capsys.readouterr().err


def test_options_that_have_an_effect_beside_the_others_are_not_told() -> None:
    for overrides in (
        ["num_steps=3"],
        ["num_epochs=2", "data.last_batch=drop"],
        ["num_steps=4", "reward.functions=[{name: accuracy, from_step: 3}]"],
        ["learner.lr_scheduler_type=cosine_with_min_lr", "learner.min_lr_ratio=0.2"],
        ["tracking.project=x", "tracking.wandb=true"],
        ["data.eval.path=a", "eval={num_samples: 4, temperature: 1, top_p: 0.9}", "data.exclude_eval=false"],
        ["reward.on_failure={action: value, value: 1}"],
        ["algorithm={epsilon_high: 0.3, num_mini_batches: 2}"],
        ["algorithm={epsilon_high: 0.3, max_staleness: 1}"],
        ["algorithm=dapo"],
        ["algorithm=v3_2"],
    ):
        assert without_effect(run_config(*overrides), "train") == {}, overrides


def test_held_out_rows_of_fine_tuning_that_exclude_nothing_are_told() -> None:
    config = supervised(SftConfig, "data.eval.path=a.jsonl", "data.exclude_eval=false")
    assert "measures nothing" in without_effect(config, "sft")["data.eval"]
    assert without_effect(supervised(SftConfig, "data.eval.path=a.jsonl"), "sft") == {}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_no_shipped_recipe_sets_an_option_that_does_nothing(recipe: Path) -> None:
    recipe = ROOT / recipe
    if "stages" in recipe.read_text():
        return
    kind = kind_of(recipe)
    config = load_recipe(SCHEMAS[kind], str(recipe), [])
    assert not_looked_at(config, COMMANDS[kind]) | without_effect(config, COMMANDS[kind]) == {}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"samples_shown": 3}, "samples_shown"),
        ({"eval_by": None}, "eval_by"),
        ({"common": {"dpo": {"num_steps": 3}}}, "common.dpo"),
        ({"assume": {"tokens_per_s": {"sfft": 3}}}, "assume.tokens_per_s.sfft"),
        ({"stages": {"base": {"kind": "sft", "config": {**SUPERVISED, "name": "x"}}}}, "stages.base.config.name"),
        ({"stages": {"base": {"kind": "sft", "config": {**SUPERVISED, "dir": "x"}}}}, "stages.base.config.dir"),
        (
            {"stages": {"base": {"kind": "sft", "config": {**SUPERVISED, "cluster": {"num_cpus": 3}}}}},
            "stages.base.config.cluster.num_cpus",
        ),
        ({"stages": {"base": {"kind": "sft", "config": SUPERVISED, "eval": {"seed": 3}}}}, "stages.base.eval"),
        ({"stages": {"base": {"kind": "reward_model", "config": PAIRS, "eval": False}}}, "stages.base.eval"),
        ({"stages": {"base": {"kind": "data", "config": {"ngram": 5}}}}, "stage base: ngram"),
        ({"stages": {"base": {"kind": "data", "config": {"ratio": 2, "other": [{"path": "a"}]}}}}, "stage base: ratio"),
        (
            {"stages": {"base": {"kind": "data", "config": {"samples": [KEPT]}}}},
            "stage base: samples.0.prefer",
        ),
        (
            {"stages": {"base": {"kind": "sft", "config": {**SUPERVISED, "learner": {"min_lr_ratio": 0.3}}}}},
            "stage base: learner.min_lr_ratio",
        ),
    ],
)  # fmt: skip
def test_options_of_a_pipeline_that_do_nothing_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], key: str
) -> None:
    recipe = {"stages": {"base": {"kind": "sft", "config": SUPERVISED}}} | change
    path = tmp_path / "stages.yaml"
    path.write_text(json.dumps(recipe))
    tell_idle_of_pipeline(load_plan(str(path), []))
    assert f"{key}: no effect" in capsys.readouterr().err


def test_a_completion_that_no_context_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="is 1000, and the model's context is 512 tokens"):
        check_context(run_config("rollout.max_completion_length=1000"), 512)
    config = run_config("rollout.max_completion_length=500", "data.max_prompt_length=64")
    check_context(config, 512)
    assert about_context(config, 512, longest_prompt=12) is None
    told = about_context(config, 512, longest_prompt=13)
    assert told is not None
    assert "its samples are cut at 499" in told
    with pytest.raises(ConfigError, match="the model's context is 256"):
        check_effects(run_config("rollout.max_completion_length=300"), "train", [])


def test_check_says_how_long_samples_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i)}) + "\n" for i in range(9))
    )
    recipe = {**RL, "data": {"train": {"path": "rows.jsonl", "split": "train[:50%]"}, "max_prompt_length": 64}}
    recipe["model"] = {
        "tiny": {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1},
        "dtype": "float32",
    }
    Path("r.yaml").write_text(
        json.dumps(recipe | {"reward": {**RL["reward"], "num_cpus": 0}, "cluster": {"num_cpus": 2}})
    )
    check_recipe("r.yaml", ["data.system=Add them up."])
    out = " ".join(capsys.readouterr().out.split())
    assert out.endswith(f"ok {runnable('grpo-ray train r.yaml')} 'data.system=Add them up.'")
    assert "samples of up to 255 tokens" in out
    assert "rows.jsonl train[:50%]: 4 of 4 prompts" in out
    assert "its samples are cut at" in out


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", range(10)),
        ("train[:50%]", range(5)),
        ("train[50%:]", range(5, 10)),
        ("train[2:4]", range(2, 4)),
        ("train[-3:]", range(7, 10)),
        ("train[:1]+train[-1:]", [0, 9]),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "splits", "python"])
def test_a_split_means_the_same_rows_of_every_kind_of_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, split: str, expected: Sequence[int]
) -> None:
    import datasets

    rows = [{"prompt": f"p{i}"} for i in range(10)]
    path = str(tmp_path / f"rows.{kind}")
    if kind == "jsonl":
        Path(path).write_text("\n\n".join(map(json.dumps, rows)))
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "python":
        (tmp_path / "made_rows.py").write_text(f"def rows():\n    return {rows!r}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "made_rows", raising=False)
        path = "python:made_rows.rows"
    else:
        data = datasets.Dataset.from_list(rows)
        (data if kind == "saved" else datasets.DatasetDict({"train": data, "test": data.select([0])})).save_to_disk(
            path
        )
    table = load_table(DataSource(path=path, split=split), seed=1)
    assert list(table.rows) == [rows[i] for i in expected]
    if kind == "jsonl":
        assert table.where(0).endswith(f"line {1 + 2 * next(iter(expected))}")
    limited = load_table(DataSource(path=path, split=split, limit=1), seed=1)
    assert list(limited.rows) == [rows[next(iter(expected))]]


@pytest.mark.parametrize("split", ["test", "Train", "train[10:20", "train[a]", "all", "", "train[20:]", "train[:0]"])
def test_a_split_that_a_file_does_not_have_is_refused(tmp_path: Path, split: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n' * 10)
    with pytest.raises(DataError, match=r"has no split|holds none"):
        load_table(DataSource(path=str(path), split=split), seed=1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "a.jsonl", "name": "main"}, "is a subset of a Hugging Face data set"),
        ({"path": "reasoning_gym:chain_sum", "name": "main"}, "is a subset of"),
        ({"path": "python:a.b", "name": "main"}, "is a subset of"),
        ({"path": "a.parquet", "args": {"size": 3}}, "are a generator's"),
        ({"path": "openai/gsm8k", "args": {"size": 3}}, "are a generator's"),
    ],
)
def test_options_of_other_kinds_of_sources_are_refused(source: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_table(DataSource(**source), seed=1)


def test_a_kv_cache_is_kept_for_samples_in_progress_of_which_there_are_none_on_policy() -> None:
    assert "weights.keep_kv_cache" in without_effect(run_config("weights.keep_kv_cache=true"), "train")
    ahead = run_config("weights.keep_kv_cache=true", "algorithm.max_staleness=1")
    assert "weights.keep_kv_cache" not in without_effect(ahead, "train")


def test_options_of_gpus_are_told_where_there_is_none() -> None:
    config = run_config("rollout.gpu_memory_utilization=0.5", "learner.offload_optimizer=true", "learner.zero_stage=1")
    assert set(without_gpu(config)) == {"rollout.gpu_memory_utilization", "learner.offload_optimizer"}
    assert without_gpu(run_config()) == {}
