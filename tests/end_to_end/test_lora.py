"""Whole runs with adapters: sent as they are, they train what merged weights train."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import LIMIT_S, NUM_STEPS, ledger, metrics, run, train, write_recipe

pytestmark = [pytest.mark.timeout(3 * LIMIT_S), pytest.mark.slow]


def overrides(transfer: str) -> list[str]:
    return [f"model.lora={{r: 4, alpha: 8, transfer: {transfer}}}", "learner.learning_rate=1e-2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def adapter_run(recipe: Path) -> Path:
    args, run_dir = train(recipe, "adapter", *overrides("adapter"))
    code, output = run(*args)
    assert code == 0, output
    return run_dir


def test_adapters_train_what_merged_weights_train(recipe: Path, adapter_run: Path) -> None:
    args, merged_run = train(recipe, "merged", *overrides("merged"))
    code, output = run(*args)
    assert code == 0, output
    adapter, merged = metrics(adapter_run), metrics(merged_run)
    assert len(adapter) == len(merged) == NUM_STEPS
    assert all(m["mismatch/mean_abs"] < 1e-5 for m in adapter)
    assert adapter[0]["reward/mean"] == merged[0]["reward/mean"]
    for a, m in zip(adapter, merged, strict=True):
        assert a["grad_norm"] == pytest.approx(m["grad_norm"], rel=1e-3)
        assert a["sync/bytes"] < m["sync/bytes"] / 3
    assert ledger(adapter_run) == ledger(merged_run)


def test_a_run_with_adapters_is_evaluated_by_its_exported_model(adapter_run: Path) -> None:
    code, output = run("eval", str(adapter_run))
    assert code == 0, output
    assert "held-out accuracy" in output
    assert (adapter_run / "hf" / "lora" / "adapter_model.safetensors").is_file()


def test_a_run_with_adapters_is_resumed(adapter_run: Path, recipe: Path) -> None:
    args, run_dir = train(recipe, "resumed", *overrides("adapter"), "num_steps=3", "checkpoint.every_steps=3")
    code, output = run(*args)
    assert code == 0, output
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("num_steps: 3", f"num_steps: {NUM_STEPS}"))
    code, output = run("resume", str(run_dir))
    assert code == 0, output
    assert ledger(run_dir) == ledger(adapter_run)
    for resumed, whole in zip(metrics(run_dir), metrics(adapter_run), strict=True):
        assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
        assert resumed["mismatch/mean_abs"] < 1e-5


def test_sampling_ahead_with_adapters_keeps_its_bound(recipe: Path) -> None:
    ahead = ["algorithm.max_staleness=2", "rollout.num_actors=2", "rollout.max_num_seqs=4"]
    args, run_dir = train(recipe, "ahead", *overrides("adapter"), *ahead)
    code, output = run(*args)
    assert code == 0, output
    assert all(m["staleness/max"] <= 2 for m in metrics(run_dir))
    assert metrics(run_dir)[-1]["staleness/mean"] > 0
    assert [row[2:4] for row in ledger(run_dir)] == [("trained", s) for s in range(1, NUM_STEPS + 1) for _ in range(4)]
