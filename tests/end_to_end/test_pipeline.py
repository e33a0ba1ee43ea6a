"""Whole pipelines and offline sampling through the command line, with the real engines, on a tiny model; killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from grpo_ray.pipeline.record import Cost, Record
from grpo_ray.run.sample_files import read_samples
from tests.end_to_end.runs import RECIPE, finish, launch, run

LIMIT_S = 300
KILLS = int(os.environ.get("PIPELINE_KILLS", "3"))
pytestmark = [pytest.mark.timeout((KILLS + 4) * LIMIT_S), pytest.mark.slow]
RUN = {key: RECIPE[key] for key in ("rollout", "reward", "data")}
PROMPTS = {"path": "reasoning_gym:chain_sum", "args": {"size": 60, "seed": 3}}
MODEL = {"model": {"path": "${stages.base.model}", "dtype": "float32"}}
PIPELINE: dict[str, Any] = {
    "common": {
        "all": {"learner": {**RECIPE["learner"], "overlap": False}, "checkpoint": {"every_steps": 2}},
        "train": RUN,
        "sample": {**RUN, "data": {"train": PROMPTS, "max_prompt_length": 120}},
    },
    "stages": {
        "base": {
            "kind": "sft",
            "config": {
                "model": RECIPE["model"],
                "num_steps": 8,
                "examples_per_step": 8,
                "max_length": 160,
                "data": {
                    "train": {
                        "path": "reasoning_gym:chain_sum",
                        "args": {"size": 64, "seed": 9},
                        "columns": {"completion": "answer"},
                    }
                },
            },
            "gate": [{"metric": "loss/sft", "at_most": 10}],
        },
        "zero": {"kind": "train", "config": {**MODEL, "num_steps": 3, "prompts_per_step": 4}},
        "samples": {
            "kind": "sample",
            "config": {
                "model": {"path": "${stages.zero.model}", "dtype": "float32"},
                "sample": {"num_samples": 3, "shard_prompts": 4},
            },
        },
        "data": {
            "kind": "data",
            "config": {
                "samples": [
                    {
                        "path": "${stages.samples.samples}",
                        "filter": {"form": None, "finished": False, "max_foreign_words": None},
                        "keep_per_prompt": 2,
                    }
                ]
            },
        },
        "cold": {
            "kind": "sft",
            "config": {
                **MODEL,
                "num_steps": 3,
                "examples_per_step": 4,
                "max_length": 160,
                "data": {"train": {"path": "${stages.data.data}"}},
            },
        },
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline") / "r1.yaml"
    path.write_text(yaml.safe_dump(PIPELINE))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """One that is never stopped."""
    code, output = run("pipeline", str(recipe), f"dir={recipe.parent}/whole")
    assert code == 0, output
    return recipe.parent / "whole" / "r1"


def identities(folder: Path) -> dict[str, Any]:
    """Everything of the stages except their costs: the same after any number of kills."""
    return {name: replace(stage, cost=Cost()) for name, stage in Record.open(folder).stages.items()}


def kill_everything(root: Any) -> None:
    """SIGKILL for it and all that it has started, the cluster included."""
    processes = psutil.Process(root.pid).children(recursive=True)
    for process in [psutil.Process(root.pid), *processes]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)
    root.communicate()


def test_every_stage_leaves_what_it_promises(whole: Path) -> None:
    stages = Record.open(whole).stages
    assert list(stages) == ["base", "zero", "samples", "data", "cold"]
    assert all(stage.done for stage in stages.values())
    assert [set(stage.outputs) for stage in stages.values()] == [
        {"model"},
        {"model"},
        {"samples"},
        {"data"},
        {"model"},
    ]
    assert stages["cold"].inputs == {
        "base.model": stages["base"].outputs["model"],
        "data.data": stages["data"].outputs["data"],
    }
    assert stages["samples"].metrics["length"] > 0
    rows = [json.loads(line) for line in (whole / "r1.data" / "data.jsonl").read_text().splitlines()]
    assert stages["data"].metrics["num_rows"] == len(rows)
    report = (whole / "report.html").read_text()
    assert all(name in report for name in stages)


def test_what_is_done_is_not_done_again(recipe: Path, whole: Path) -> None:
    before = (whole / "pipeline.json").read_text()
    code, output = run("pipeline", str(recipe), f"dir={whole.parent}")
    assert code == 0, output
    assert "to run   0 stages" in output
    assert (whole / "pipeline.json").read_text() == before


def test_a_gate_that_is_shut_stays_shut(recipe: Path, whole: Path) -> None:
    gate = "stages.base.gate=[{metric: loss/sft, at_most: 0.001}]"
    for _ in range(2):
        code, output = run("pipeline", str(recipe), f"dir={whole.parent}", gate)
        assert code == 1, output
        assert "the gate of stage base is shut: loss/sft" in output


def test_a_changed_config_and_a_changed_model_are_refused_by_name(recipe: Path, whole: Path) -> None:
    code, output = run("pipeline", str(recipe), f"dir={whole.parent}", "stages.cold.config.num_steps=4")
    assert code == 2, output
    assert "stage cold of" in output
    assert "--from cold" in output
    model = next((whole / "r1.base" / "hf").glob("*.safetensors"))
    good = model.read_bytes()
    try:
        model.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        code, output = run(
            "pipeline", str(recipe), f"dir={whole.parent}", "stages.cold.config.num_steps=4", "--from", "cold"
        )
        assert code == 1, output
        assert "model of stage base" in output
        assert "has changed since it was made" in output
    finally:
        model.write_bytes(good)


def test_a_stage_is_run_again_with_what_builds_on_it_and_makes_the_same(recipe: Path, whole: Path) -> None:
    before = identities(whole)
    code, output = run("pipeline", str(recipe), f"dir={whole.parent}", "--from", "data", "--until", "data")
    assert code == 0, output
    assert "to run   1 stages" in output
    assert (whole / "r1.data.old-1" / "data.jsonl").is_file()
    assert (whole / "r1.cold.old-1" / "hf").is_dir()
    assert not Record.open(whole).done("cold")
    code, output = run("pipeline", str(recipe), f"dir={whole.parent}")
    assert code == 0, output
    assert identities(whole) == before


def test_killed_at_random_moments_it_ends_as_one_that_was_not(recipe: Path, whole: Path) -> None:
    rng = random.Random(7)
    folder = recipe.parent / "killed" / "r1"
    kills = 0
    for _ in range(KILLS):
        process = launch("pipeline", str(recipe), f"dir={folder.parent}")
        deadline = time.monotonic() + rng.uniform(10, 60)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        kills += process.poll() is None
        kill_everything(process)
    assert kills > 0
    code, output = finish(launch("pipeline", str(recipe), f"dir={folder.parent}"))
    assert code == 0, output
    assert identities(folder) == identities(whole)
    rows = [(r["prompt_id"], r["index"]) for r in read_samples(folder / "r1.samples" / "samples")]
    assert rows == [(r["prompt_id"], r["index"]) for r in read_samples(whole / "r1.samples" / "samples")]
    assert len(set(rows)) == len(rows) == 180


@pytest.mark.usefixtures("recipe")
def test_samples_of_a_killed_run_are_row_for_row_those_of_a_whole_one(whole: Path, tmp_path: Path) -> None:
    config = {
        **RECIPE,
        "model": {"path": str(whole / "r1.zero" / "hf"), "dtype": "float32"},
        "data": {"train": {**PROMPTS, "args": {"size": 400, "seed": 3}}, "max_prompt_length": 120},
        "sample": {"num_samples": 4, "shard_prompts": 4},
    }
    path = tmp_path / "sample.yaml"
    path.write_text(yaml.safe_dump(config))
    code, output = run("sample", str(path), f"dir={tmp_path}", "name=straight")
    assert code == 0, output
    process = launch("sample", str(path), f"dir={tmp_path}", "name=broken")
    shards = tmp_path / "broken" / "samples"
    deadline = time.monotonic() + LIMIT_S
    while len(list(shards.glob("*.parquet"))) < 5:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_everything(process)
    left = len(list(shards.glob("*.parquet")))
    assert left < 100, "it was killed too late to show anything"
    code, output = run("resume", str(tmp_path / "broken"))
    assert code == 0, output
    assert "samples were there already" in output
    straight = list(read_samples(tmp_path / "straight" / "samples"))
    assert list(read_samples(shards)) == straight
    assert len(straight) == 1600
