"""From pairs to a reward model to a run that it rewards; and DPO on the same pairs, stopped and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.end_to_end.runs import LIMIT_S, RECIPE, metrics, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose chosen answer says please, and recipes that learn from them."""
    folder = tmp_path_factory.mktemp("preferences")
    for name, numbers in (("pairs", range(40)), ("held", range(40, 48))):
        rows = [
            {"prompt": f"Say {i}.", "chosen": f"<think>hm</think>{i}, please", "rejected": f"<think>hm</think>{i}, now"}
            for i in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "dir": str(folder),
        "num_steps": 6,
        "examples_per_step": 8,
        "max_length": 80,
        "model": RECIPE["model"],
        "data": {"train": {"path": str(folder / "pairs.jsonl")}, "eval": {"path": str(folder / "held.jsonl")}},
        "learner": {"num_cpus": 1, "learning_rate": 2e-3, "zero_stage": 2, "micro_batch_tokens": 512},
        "checkpoint": {"every_steps": 2, "keep": 5},
    }
    for kind in ("dpo", "reward_model"):
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump(recipe | {kind: {}}))
    return folder


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Path:
    code, output = run("reward-model", str(folder / "reward_model.yaml"), "name=scorer", "num_steps=12")
    assert code == 0, output
    assert "held out after step 12: accuracy 1" in " ".join(output.split())
    return folder / "scorer"


def test_a_reward_model_learns_what_is_preferred(scorer: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    told = lines(scorer)
    measured = {line["step"]: line["eval/accuracy"] for line in told if "eval/accuracy" in line}
    assert measured == {0: 0.0, 12: 1.0}, "before, all scores are 0 and nothing is ahead"
    steps = [line for line in told if "loss/reward_model" in line]
    assert steps[0]["loss/reward_model"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[-1]["pairs/accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(scorer / "hf")
    assert model.config.num_labels == 1


def test_a_run_is_rewarded_by_it_in_its_last_steps_alone(scorer: Path, folder: Path) -> None:
    from_model = {
        "name": "reward_model",
        "label": "helpful",
        "part": "summary",
        "from_step": 1,
        "args": {"path": str(scorer / "hf")},
        "workers": {"num_actors": 1, "num_cpus": 0},
    }
    recipe = RECIPE | {"reward": {"functions": [*RECIPE["reward"]["functions"], from_model], "num_cpus": 0}}
    recipe |= {"num_steps": 3, "dir": str(folder), "name": "rewarded"}
    (folder / "rewarded.yaml").write_text(yaml.safe_dump(recipe))
    code, output = run("train", str(folder / "rewarded.yaml"))
    assert code == 0, output
    first, *later = metrics(folder / "rewarded")
    assert "reward/helpful/mean" not in first
    digits = "reward/tests.end_to_end.rewards.share_of_digits/mean"
    assert first["reward/mean"] == pytest.approx(first[digits])
    for step in later:
        assert step["reward/mean"] == pytest.approx(step[digits] + step["reward/helpful/mean"], abs=1e-6)
    assert (folder / "rewarded" / "logs" / "reward-helpful-0.log").is_file()


def test_dpo_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(folder: Path) -> None:
    code, output = run("dpo", str(folder / "dpo.yaml"), "name=direct")
    assert code == 0, output
    whole = folder / "direct"
    steps = {line["step"]: line for line in lines(whole) if "loss/dpo" in line}
    assert steps[1]["loss/dpo"] == pytest.approx(0.6931, abs=1e-4)
    assert steps[1]["pairs/margin"] == pytest.approx(0.0, abs=1e-5)
    assert steps[6]["loss/dpo"] < steps[1]["loss/dpo"]
    measured = {line["step"]: line for line in lines(whole) if "eval/accuracy" in line}
    assert measured[0]["eval/margin"] == pytest.approx(0.0, abs=1e-4)
    assert measured[6]["eval/accuracy"] == 1.0

    again = folder / "again"
    shutil.copytree(whole, again, symlinks=True)
    for step in (4, 6):
        shutil.rmtree(again / "checkpoints" / f"step-{step:06d}")
    config = yaml.safe_load((again / "config.yaml").read_text()) | {"name": "again"}
    (again / "config.yaml").write_text(yaml.safe_dump(config))
    code, output = run("resume", str(again))
    assert code == 0, output
    resumed = {line["step"]: line for line in lines(again) if "loss/dpo" in line}
    assert sorted(resumed) == [1, 2, 3, 4, 5, 6]
    for step in range(3, 7):
        assert resumed[step]["loss/dpo"] == steps[step]["loss/dpo"]
    one, other = (load_file(path / "hf" / "model.safetensors") for path in (whole, again))
    assert all((one[name] == other[name]).all() for name in one)
