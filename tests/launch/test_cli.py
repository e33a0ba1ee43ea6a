"""The command line on bad input: one clear message, an exit code, no traceback, nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml

from tests.commands import run_command

RECIPE = {
    "model": {"tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}, "dtype": "float32"},
    "data": {"train": {"path": "rows.jsonl"}, "max_prompt_length": 64},
    "rollout": {"max_completion_length": 16},
    "reward": {"functions": [{"name": "accuracy"}], "num_cpus": 0},
    "num_steps": 1,
    "cluster": {"num_cpus": 2},
}


def grpo_ray(folder: Path, *args: str) -> CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    return run_command(folder, *args, env=env | {"COLUMNS": "200"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    rows = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "code", "expected"),
    [
        ("learner.zero_stge=3", 2, "did you mean learner.zero_stage?"),
        ("rollout.num_generations=1", 2, "a group of one has no baseline"),
        ("model={path: ./nowhere, tiny: null}", 2, "model.path ./nowhere does not exist"),
        ("name=taken", 2, "grpo-ray resume"),
        ("reward.functions=[{name: acuracy}]", 1, "accuracy"),
        ("reward.functions=[{name: no_such_module.reward}]", 1, "no_such_module"),
        ("reward.functions=[{name: code, args: {command: [no-such-tool]}}]", 1, "'no-such-tool' is not in"),
        ("nonsense", 2, "key=value"),
    ],
)
def test_train_refuses_before_anything_is_started(folder: Path, override: str, code: int, expected: str) -> None:
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "runs" / "taken" / "config.yaml").write_text("{}")
    result = grpo_ray(folder, "train", "recipe.yaml", "name=run", override)
    assert result.returncode == code, result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in (folder / "runs").iterdir()) == ["taken"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["data.train.columns={prompt: question}"], "question"),
        (["data.train.path=empty.jsonl"], "empty.jsonl"),
        (["data.train.path=torn.jsonl"], "line 17"),
        (["data.long_prompts=error", "data.max_prompt_length=3"], "3"),
        (["rollout.num_actors=9"], "10 CPUs are asked for (rollout 9 x 1 + learner 1 x 1), 2 are there"),
        (["data.train.path=reasoning_gym:chain_sun"], "chain_sum"),
    ],
)
def test_check_names_the_culprit_in_data_and_resources(folder: Path, change: list[str], expected: str) -> None:
    (folder / "empty.jsonl").write_text("")
    lines = (folder / "rows.jsonl").read_text().splitlines()
    lines[16] = lines[16][:-3]
    (folder / "torn.jsonl").write_text("\n".join(lines))
    result = grpo_ray(folder, "check", "recipe.yaml", *change)
    assert result.returncode == 1, result.stdout + result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_check_prints_the_plan(folder: Path) -> None:
    result = grpo_ray(folder, "check", "recipe.yaml", "learner.num_cpus=0.5")
    assert result.returncode == 0, result.stderr
    for part in (
        "20 of 20 prompts",
        "32 prompts x 8 samples",
        "a sample ends at <eos> (1)",
        "this machine (2 CPUs",
        "ok",
    ):
        assert part in result.stdout


def test_more_actors_than_cpus_are_told_without_waiting(folder: Path) -> None:
    result = grpo_ray(folder, "train", "recipe.yaml", "name=run", "learner.num_actors=3")
    assert result.returncode == 1
    assert "4 CPUs are asked for (rollout 1 x 1 + learner 3 x 1), 2 are there" in result.stderr
    assert "learner.num_actors=1" in result.stderr
    assert not (folder / "runs" / "run").exists()


def test_check_says_how_many_golds_accuracy_does_not_understand(folder: Path) -> None:
    golds = ["Paris", "2", "[red]yes[/red]", "2024-01-02", ["12", "34"], 1e-05, [], 8]
    rows = [{"prompt": f"Question {i}?", "answer": gold} for i, gold in enumerate(golds)]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    words = [{"prompt": f"Is it {r['prompt']}", "answer": "yes"} for r in rows]
    (folder / "words.jsonl").write_text("".join(json.dumps(r) + "\n" for r in words))
    result = grpo_ray(folder, "check", "recipe.yaml", "data.train.path=mixed.jsonl", "data.eval={path: words.jsonl}")
    assert result.returncode == 0, result.stderr
    told = " ".join(result.stdout.split())
    assert "data.train: 4 not understood by accuracy (8), e.g. mixed.jsonl, row 0: 'Paris'" in told
    assert "'[red]yes[/red]'" in told
    assert "WARNING: data.eval: 8 not understood by accuracy (8)" in told
    assert "nothing be measured on it" in told
    assert "No row would get a reward from accuracy" in told


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["check", "--list"]])
def test_help_helps(folder: Path, args: list[str]) -> None:
    result = grpo_ray(folder, *args)
    assert result.returncode == 0
    assert "RECIPE" in result.stdout or "resume" in result.stdout or "reasoning_gym" in result.stdout


def test_an_unknown_recipe_is_told_with_a_guess(folder: Path) -> None:
    result = grpo_ray(folder, "train", "smok")
    assert result.returncode == 2
    assert "did you mean smoke" in result.stderr


@pytest.fixture
def pipeline(folder: Path) -> Path:
    model = {"path": "${stages.base.model}", "dtype": "float32"}
    sft = {"kind": "sft", "config": {"num_steps": 2, "model": RECIPE["model"], "data": RECIPE["data"]}}
    train = {"kind": "train", "config": {**RECIPE, "model": model}}
    (folder / "stages.yaml").write_text(yaml.safe_dump({"stages": {"base": sft, "zero": train}}))
    return folder


def test_a_dry_run_prints_the_plan_and_leaves_nothing(pipeline: Path) -> None:
    for args in (["pipeline", "stages.yaml", "--dry-run"], ["check", "stages.yaml"]):
        result = grpo_ray(pipeline, *args, "assume={tokens_per_s: {sft: 1000, train: 1000}, completion_tokens: 8}")
        assert result.returncode == 0, result.stderr
        assert "2 steps x 128 examples" in result.stdout
        assert "1 steps x 32 prompts x 8 samples" in result.stdout
        # 2 x 128 x 8, and 32 x 8 x (8 + 64 / 2); a minute each to start.
        assert "to run   2 stages, about 12,288 tokens, about 2m12s" in result.stdout
    assert not (pipeline / "runs").exists()


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["pipeline", "recipe.yaml"], 2, "has no stages"),
        (["train", "stages.yaml"], 2, "grpo-ray pipeline stages.yaml"),
        (["pipeline", "stages.yaml", "--from", "bsae"], 2, "did you mean base?"),
        (["pipeline", "stages.yaml", "--from", "zero"], 2, "stage base comes before it and is not done"),
        (["pipeline", "stages.yaml", "stages.zero.config.num_stpes=1"], 2, "stage zero can't be used"),
        (["pipeline", "stages.yaml", "stages.zero.config.reward.functions=[{name: acuracy}]"], 1, "accuracy"),
        (["sample", "recipe.yaml", "sample.num_samples=0"], 2, "sample.num_samples"),
    ],
)
def test_pipelines_are_refused_before_anything_is_started(
    pipeline: Path, args: list[str], code: int, expected: str
) -> None:
    result = grpo_ray(pipeline, *args)
    assert result.returncode == code, result.stdout + result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (pipeline / "runs").exists()


def test_replay_says_why_a_step_cannot_be_replayed(folder: Path) -> None:
    run = folder / "runs" / "done"
    (run / "rollouts").mkdir(parents=True)
    (run / "rollouts" / "step-000001.parquet").touch()
    (run / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    sft = {"model": RECIPE["model"], "data": RECIPE["data"]}
    (folder / "runs" / "sft").mkdir()
    (folder / "runs" / "sft" / "config.yaml").write_text(yaml.safe_dump(sft))
    for name, code, expected in (
        ("done", 1, "rollouts/ has no batch of step 2. Steps that can: 1;"),
        ("sft", 2, "it records no batches; only steps of `"),
        ("nowhere", 2, "is not a run"),
    ):
        result = grpo_ray(folder, "replay", f"runs/{name}", "--step", "2")
        assert result.returncode == code, result.stderr
        assert expected in result.stderr
        assert "Traceback" not in result.stderr


def test_a_report_that_can_not_be_written_is_one_line(folder: Path) -> None:
    run = folder / "run"
    (run / "report.html.new").mkdir(parents=True)
    (run / "config.yaml").write_text("num_steps: 1\n")
    done = grpo_ray(folder, "report", "run")
    assert done.returncode == 2
    assert "error: the report of run can't be written: " in done.stderr
    assert "Traceback" not in done.stderr
