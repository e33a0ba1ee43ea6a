"""`grpo-ray check --gpu`: the plan on GPUs that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ray.errors import ConfigError, ResourceError
from launch.check.command import check_recipe
from launch.check.gpu import stage_rows

SEVEN_B = {
    "hidden_size": 3584,
    "num_layers": 28,
    "num_heads": 28,
    "num_kv_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "context": 9216,
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Eight learners and engines of Qwen2.5-7B's shape in turns."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"1+{i}?", "answer": str(i + 1)}) + "\n" for i in range(4)))
    data: dict[str, Any] = {
        "dir": str(tmp_path / "runs"),
        "model": {"tiny": SEVEN_B},
        "data": {"max_prompt_length": 1024, "train": {"path": str(rows)}},
        "prompts_per_step": 512,
        "num_steps": 1,
        "rollout": {"num_actors": 8, "num_generations": 8, "max_completion_length": 8192},
        "reward": {"functions": [{"name": "accuracy"}]},
        "learner": {"num_actors": 8, "zero_stage": 2, "micro_batch_tokens": 9216},
        "cluster": {"placement": "colocated"},
    }
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def told(recipe: str, *overrides: str, gpu: str, capsys: pytest.CaptureFixture[str]) -> str:
    check_recipe(recipe, list(overrides), gpu=gpu)
    return " ".join(capsys.readouterr().out.split())


def test_the_plan_is_for_the_gpus_that_are_named(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(recipe, gpu="8xh100", capsys=capsys)
    assert "8 x h100 (128 CPUs, 8 GPUs): 8 rollout x (1 CPU, 0.5 GPU)" in out
    assert "of 79.65 GiB" in out
    assert "104.7 samples of full length (9,216 tokens of 57,344 bytes)" in out
    assert "rollout.max_num_seqs is 1024, and the cache holds 105 samples" in out
    assert "on a node of 8 GPUs" in out
    assert "model.gradient_checkpointing=true" in out


def test_without_a_number_there_are_as_many_gpus_as_the_recipe_asks_for(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "8 x 80GB (128 CPUs, 8 GPUs)" in told(recipe, gpu="80GB", capsys=capsys)
    apart = ("cluster.placement=disaggregated", "rollout.tensor_parallel_size=2")
    assert "24 x h200" in told(recipe, *apart, gpu="h200", capsys=capsys)


def test_a_cache_in_fp8_and_copies_of_it_hold_more_samples(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    fp8 = ("rollout.kv_cache_dtype=fp8", "algorithm.importance_sampling=token_truncate")
    out = told(recipe, *fp8, gpu="8xh100", capsys=capsys)
    assert "209.4 samples of full length (9,216 tokens of 28,672 bytes)" in out
    apart = ("cluster.placement=disaggregated", "rollout.num_actors=4", "rollout.data_parallel_size=2")
    out = told(recipe, *apart, gpu="16xh100", capsys=capsys)
    assert "in 2 copies of 51.5" in out
    assert "209.4 samples of full length (9,216 tokens of 57,344 bytes)" in out


def test_what_this_machine_lacks_is_no_matter_where_other_gpus_are_named(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, error in (("rollout.kv_cache_gb=40", ResourceError), ("rollout.speculative={}", ConfigError)):
        assert "ok" in told(recipe, option, gpu="8xh100", capsys=capsys)
        with pytest.raises(error, match=r"rollout\.(kv_cache_gb|speculative)"):
            check_recipe(recipe, [option])


def test_engines_over_two_gpus_share_those_of_all_learners(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    two = ("rollout.tensor_parallel_size=2", "rollout.num_actors=4")
    out = told(recipe, *two, gpu="8xh100", capsys=capsys)
    assert "8 x h100 (128 CPUs, 8 GPUs): 4 rollout x (1 CPU, 1 GPU)" in out
    assert "tokens of 28,672 bytes)" in out
    with pytest.raises(ConfigError, match=r"rollout\.num_actors 8; .* use learner\.num_actors 16"):
        check_recipe(recipe, [two[0]], gpu="8xh100")


def test_micro_batches_are_chosen_for_the_gpus(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = told(recipe, "learner.micro_batch_tokens=auto", gpu="h200", capsys=capsys)
    assert "learner.micro_batch_tokens=32768" in out


def test_what_does_not_fit_is_refused_with_overrides_that_pass(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    off = "model.gradient_checkpointing=false"
    with pytest.raises(ResourceError, match=r"8 x h100.*each learner .* of 79\.65 GiB .*activations 56\.72 GiB") as e:
        check_recipe(recipe, [off], gpu="h100")
    _, _, would = str(e.value).partition("This would fit: ")
    assert would == "model.gradient_checkpointing=true"
    told(recipe, *would.split(), gpu="h100", capsys=capsys)
    with pytest.raises(ResourceError) as e:
        check_recipe(recipe, [off], gpu="24GB")
    _, _, would = str(e.value).partition("This would fit: ")
    told(recipe, *would.split(), gpu="24GB", capsys=capsys)


def test_each_stage_of_a_pipeline_is_planned_by_the_model_that_it_will_have() -> None:
    rows = dict(stage_rows("r1_tiny", [], "l4"))
    assert {"base", "zero", "cold", "reasoning", "samples", "preferences", "all", "all-eval"} <= set(rows)
    assert not {"cold_data", "data"} & set(rows)
    assert all(row.startswith("each ") for row in rows.values())
    assert "each learner" in rows["all"]
    assert "each engine" in rows["all"]
    with pytest.raises(ResourceError, match=r"stage base-eval on \d x 1\.5GB: too little memory: each engine"):
        dict(stage_rows("r1_tiny", [], "1.5GB"))


@pytest.mark.slow
def test_a_pipeline_whose_models_are_not_here_says_so() -> None:
    import torch  # noqa: F401  # so that no child process looks for the models

    rows = dict(stage_rows("r1_7b", [], "16x80GB"))
    assert rows["zero"] == "nothing is said of it, for Qwen/Qwen2.5-7B is neither here nor to be had from the hub now"


def test_unknown_gpus_are_refused(recipe: str) -> None:
    with pytest.raises(ConfigError, match="did you mean h100"):
        check_recipe(recipe, [], gpu="h1000")


@pytest.mark.parametrize("gpu", ["t4", "8xv100", "V100-32GB"])
def test_a_gpu_without_bfloat16_is_refused_for_a_model_in_it(recipe: str, gpu: str) -> None:
    with pytest.raises(ConfigError, match=r"has no bfloat16.*model\.dtype=float32"):
        check_recipe(recipe, [], gpu=gpu)
