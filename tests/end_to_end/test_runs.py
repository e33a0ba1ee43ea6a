"""Whole runs through the command line, with the real Ray, vLLM and DeepSpeed, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

GRPO_RAY = [sys.executable, "-m", "launch"]
LIMIT_S = 420
RECIPE = {
    "model": {
        "tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "seed": 3},
        "dtype": "float32",
    },
    "data": {
        "train": {"path": "reasoning_gym:chain_sum", "args": {"size": 64, "seed": 1}},
        "eval": {"path": "reasoning_gym:chain_sum", "args": {"size": 8, "seed": 2}},
        "max_prompt_length": 120,
    },
    "rollout": {"num_generations": 4, "max_completion_length": 24, "num_cpus": 0.5},
    "reward": {"functions": [{"name": "tests.end_to_end.rewards.share_of_digits"}], "num_cpus": 0},
    "learner": {"zero_stage": 2, "learning_rate": 1e-3, "num_cpus": 0.5, "micro_batch_tokens": 2048},
    "prompts_per_step": 4,
    "num_steps": 4,
    "eval": {"threshold": 0.5},
}


started: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    started.clear()


def launch(folder: Path, *args: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"} | {"COLUMNS": "150"}
    process = subprocess.Popen(
        [*GRPO_RAY, *args],
        cwd=Path(__file__).parent.parent.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"no end within {LIMIT_S} s:\n{output}")
    return process.returncode, output


def run(folder: Path, *args: str) -> tuple[int, str]:
    return finish(launch(folder, *args))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def train(recipe: Path, name: str, *overrides: str) -> tuple[list[str], Path]:
    folder = recipe.parent
    return ["train", str(recipe), f"dir={folder}", f"name={name}", *overrides], folder / name


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/policy" in line]


def ledger(run_dir: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(run_dir / "ledger.sqlite") as db:
        return list(
            db.execute("SELECT prompt_id, dispatch_order, state, step, drop_reason FROM groups ORDER BY dispatch_order")
        )


@pytest.fixture(scope="module")
def whole_run(recipe) -> Path:
    """One that is never stopped: one rollout actor, one learner, fp32."""
    args, run_dir = train(recipe, "whole")
    code, output = run(recipe.parent, *args)
    assert code == 0, output
    return run_dir


def test_a_run_leaves_what_it_promises(whole_run):
    names = {p.name for p in whole_run.iterdir()}
    assert {
        "config.yaml",
        "ledger.sqlite",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "report.html",
        "hf",
        "logs",
    } <= names
    assert [m["step"] for m in metrics(whole_run)] == [1, 2, 3, 4]
    assert len(list((whole_run / "rollouts").glob("*.parquet"))) == 4
    assert [row[2:4] for row in ledger(whole_run)] == [("trained", s) for s in (1, 2, 3, 4) for _ in range(4)]


def test_sampler_and_learner_agree_in_fp32(whole_run):
    assert all(m["mismatch/mean_abs"] < 1e-5 for m in metrics(whole_run))


def test_the_exported_model_is_the_trained_one_in_plain_transformers(whole_run):
    import pyarrow.parquet as pq
    import torch
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(whole_run / "hf")
    start = AutoModelForCausalLM.from_pretrained(whole_run / "model")
    rows = pq.read_table(whole_run / "rollouts" / "step-000001.parquet").to_pylist()

    def logprobs(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(row["completion_ids"])[:, None])[:, 0]

    recorded = torch.tensor(rows[0]["rollout_logprobs"])
    assert torch.allclose(logprobs(start, rows[0]), recorded, atol=2e-5)
    assert not torch.allclose(logprobs(trained, rows[0]), recorded, atol=1e-3)


@pytest.mark.parametrize(
    "stop_after", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_stopped_by_sigterm_and_resumed_equals_one_never_stopped(recipe, whole_run, stop_after):
    args, run_dir = train(recipe, f"cut-{stop_after}")
    process = launch(recipe.parent, *args)
    deadline = time.monotonic() + LIMIT_S
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < stop_after:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 143, output
    assert "grpo-ray resume" in output
    assert stop_after <= len(metrics(run_dir)) < 4
    code, output = run(recipe.parent, "resume", str(run_dir))
    assert code == 0, output
    assert ledger(run_dir) == ledger(whole_run)
    for cut, never_cut in zip(metrics(run_dir), metrics(whole_run), strict=True):
        assert cut["loss/policy"] == pytest.approx(never_cut["loss/policy"], abs=1e-5)
        assert cut["reward/mean"] == never_cut["reward/mean"]
        assert cut["grad_norm"] == pytest.approx(never_cut["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_two_rollout_actors_and_two_zero_3_learners_learn_the_same(recipe, whole_run):
    overrides = ["rollout.num_actors=2", "learner.num_actors=2", "learner.zero_stage=3", "reward.num_actors=2"]
    args, run_dir = train(recipe, "wide", *overrides)
    code, output = run(recipe.parent, *args)
    assert code == 0, output
    assert ledger(run_dir) == ledger(whole_run)
    for wide, narrow in zip(metrics(run_dir), metrics(whole_run), strict=True):
        assert wide["reward/mean"] == pytest.approx(narrow["reward/mean"], abs=1e-6)
        assert wide["grad_norm"] == pytest.approx(narrow["grad_norm"], rel=1e-3)
        assert wide["mismatch/mean_abs"] < 1e-5
