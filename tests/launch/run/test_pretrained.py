"""`grpo-ray pretrained`: which model it trains, and what counts as learning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_ray.errors import WorkerError
from launch.run import pretrained
from launch.run.pretrained import GAIN, RECIPE, run_pretrained


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The recipes and overrides of the runs that are started; none is run, and what it measured is in `metrics.jsonl`."""
    runs: list[tuple[str, list[str]]] = []

    def start(recipe: str, overrides: list[str]) -> Path:
        runs.append((recipe, overrides))
        return tmp_path

    monkeypatch.setattr(pretrained, "start_grpo", start)
    monkeypatch.setattr(pretrained, "find_model", lambda say: "the model")
    return runs


def measured(folder: Path, *accuracies: float) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"eval/accuracy": a}) + "\n" for a in accuracies))


def test_a_gain_below_the_goal_is_an_error_with_both_accuracies(
    started: list[tuple[str, list[str]]], tmp_path: Path
) -> None:
    measured(tmp_path, 0.125, 0.3, 0.125 + GAIN - 0.01)
    with pytest.raises(WorkerError, match=r"from 12\.5% to 21\.5%, and a gain of 10% is the goal; see .*report\.html"):
        run_pretrained([])


def test_accuracies_seconds_and_memory_are_told(
    started: list[tuple[str, list[str]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path, 0.125, 0.5)
    run_pretrained([])
    told = capsys.readouterr().out.split()
    assert told[:4] == ["held-out", "accuracy", "12.5%", "->"]
    assert told[told.index("GiB") - 1] == f"{float(told[told.index('GiB') - 1]):.1f}" != "0.0"


def test_the_model_that_was_found_is_trained_unless_another_is_named(
    started: list[tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(tmp_path, 0.1, 0.9)
    run_pretrained(["num_steps=3"])
    monkeypatch.setattr(pretrained, "find_model", lambda say: pytest.fail("it is not looked for"))
    run_pretrained(["model.path=/mine", "name=a"])
    (recipe, overrides), (_, named) = started
    assert recipe == RECIPE
    assert overrides[1:] == ["model.path=the model", "num_steps=3"]
    assert overrides[0].startswith("name=pretrained-")
    assert named == ["model.path=/mine", "name=a"]
