"""`resume`: what is finished is said at once, what a run may change and what not, and how long it is then."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo_ray.config.loading import all_keys, build
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.epochs import run_length
from grpo_ray.errors import ConfigError
from grpo_ray.run.ended import finished, write_ended
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.run_dir import RunDir
from launch.run.jobs import resume_run
from launch.run.resumed import MAY_CHANGE, about_schedule, changed_config, check_length, record_changes

ROOT = Path(__file__).parents[3]
SFT: dict[str, Any] = {"model": {"path": "a/b"}, "data": {"train": {"path": "c/d"}}, "num_steps": 70}
GRPO: dict[str, Any] = SFT | {"reward": {"functions": [{"name": "accuracy"}]}}


def run_of(folder: Path, recipe: dict[str, Any], step: int | None = 70) -> RunDir:
    """A run whose newest checkpoint is of that step."""
    run = RunDir.create(folder / "run")
    run.config.write_text(yaml.safe_dump(recipe))
    if step is not None:
        store = run.store
        store.commit(store.begin(step), step, {}, keep=1)
    return run


def sft(**changes: Any) -> SftConfig:
    return build(SftConfig, SFT | changes, "test")


def test_a_run_is_finished_when_its_last_step_has_a_checkpoint(tmp_path: Path) -> None:
    run = run_of(tmp_path, SFT)
    assert finished(run, sft()) is not None
    assert finished(run, sft(num_steps=71)) is None
    # By epochs only the run itself can tell, and it has written it down.
    epochs = sft(num_steps=None, num_epochs=2)
    assert finished(run, epochs) is None
    write_ended(run.path, epochs, "finished", "", 70, 70)
    assert finished(run, epochs) is not None
    assert finished(run, sft(num_steps=None, num_epochs=3)) is None
    # Stopped, and one that was resumed since and killed.
    write_ended(run.path, epochs, "SIGINT", "", 70, 90)
    assert finished(run, epochs) is None
    write_ended(run.path, epochs, "finished", "", 60, 60)
    assert finished(run, epochs) is None


def test_resume_of_a_finished_run_says_so_without_starting_ray(tmp_path: Path) -> None:
    run = run_of(tmp_path, SFT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    script = """
import sys
from launch.run.jobs import resume_run
from pathlib import Path
resume_run(Path("run"))
print(sorted({"ray", "torch", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert "finished run has done all of its 70 steps" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert json.loads(json.dumps(sorted(p.name for p in run.path.iterdir()))) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "model.dtype=float32",
        "data.train.path=other.jsonl",
        "data.shuffle=false",
        "rollout.temperature=0.5",
        "rollout.num_generations=4",
        "algorithm.beta=0.1",
        "algorithm=dapo",
        "learner.learning_rate=1e-3",
        "prompts_per_step=8",
        "reward.functions=[{name: think_format}]",
        "checkpoint.path=/elsewhere",
        "name=other",
    ],
)
def test_what_has_been_trained_cannot_be_belied(tmp_path: Path, override: str) -> None:
    run = run_of(tmp_path, GRPO)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError) as e:
        changed_config(RunConfig, run, ["num_steps=200", override])
    key = override.partition("=")[0]
    assert f"- {key}" in str(e.value)
    assert "- num_steps" not in str(e.value)
    assert run.config.read_bytes() == before


def test_every_option_that_may_change_exists() -> None:
    known = {*all_keys(RunConfig), *all_keys(SftConfig)}
    assert known >= MAY_CHANGE


def test_what_may_change_is_written_into_the_config_and_the_ledger(tmp_path: Path) -> None:
    run = run_of(tmp_path, GRPO)
    Ledger(run.ledger).close()
    overrides = ["num_steps=200", "rollout.num_actors=2", "checkpoint.every_steps=10"]
    config, changes = changed_config(RunConfig, run, overrides)
    assert changes == {"num_steps": (70, 200), "rollout.num_actors": (1, 2), "checkpoint.every_steps": (50, 10)}
    record_changes(run, config, changes, 70)
    record_changes(run, config, {"num_steps": (200, 300)}, 200)
    notes = [line for line in run.config.read_text().splitlines() if line.startswith("#")]
    assert notes[0] == "# changed by resume after step 70: num_steps 70 -> 200"
    assert notes[-1] == "# changed by resume after step 200: num_steps 200 -> 300"
    written = yaml.safe_load(run.config.read_text())
    assert (written["num_steps"], written["rollout"]["num_actors"]) == (200, 2)
    with sqlite3.connect(run.ledger) as db:
        rows = list(db.execute("SELECT step, option, before, after FROM changes ORDER BY at"))
    assert rows[0] == (70, "num_steps", "70", "200")
    assert len(rows) == 4


def test_a_run_cannot_become_shorter_than_it_is(tmp_path: Path) -> None:
    run = run_of(tmp_path, SFT)
    with pytest.raises(ConfigError, match="has done 70 steps already"):
        check_length(run, sft(num_steps=20), 70)
    check_length(run, sft(num_steps=200), 70)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match="has done 70 steps already"):
        resume_run(run.path, ["num_steps=20"])
    assert run.config.read_bytes() == before


def test_a_run_by_epochs_cannot_become_shorter_either_and_is_told_how_it_is_trained_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, SFT | {"num_steps": None, "num_epochs": 2})
    write_ended(run.path, sft(num_steps=None, num_epochs=2), "finished", "", 70, 70)
    with pytest.raises(ConfigError, match=r"num_epochs=0.5: .* has done 2 epochs already"):
        resume_run(run.path, ["num_epochs=0.5"])
    check_length(run, sft(num_steps=None, num_epochs=3), 70)
    resume_run(run.path)
    assert "num_epochs=N trains it longer" in capsys.readouterr().out.replace("\n", " ")


def test_a_change_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, SFT)
    before = run.config.read_bytes()
    with pytest.raises(ConfigError, match=r"num_epochs: num_steps is given \(70\)"):
        resume_run(run.path, ["num_epochs=3"])
    assert run.config.read_bytes() == before


def test_a_schedule_that_ends_with_the_run_is_told() -> None:
    linear = {"learner": {"lr_scheduler_type": "linear"}}
    told = about_schedule(sft(**linear), sft(num_steps=200, **linear), 70)
    assert told is not None
    assert "from step 71 on the learning rate is the one that a run of 200 steps has there" in told
    assert about_schedule(sft(**linear), sft(**linear), 70) is None
    assert about_schedule(sft(), sft(num_steps=200), 70) is None


def test_a_longer_run_trains_what_is_left_though_its_last_batch_was_short() -> None:
    """10 rows in batches of 4: 4, 4, 2, and after another epoch 4, 4, 2 again, where 20 rows at once would be 5 batches."""
    length = run_length(sft(num_steps=None, num_epochs=2, examples_per_step=4), 10)
    assert length.num_steps == 5
    assert length.steps_from(3, length.num_left(10)) == 6
    assert length.steps_from(2, length.num_left(8)) == 5
    for last_batch in ("wrap", "drop"):
        data = SFT["data"] | {"last_batch": last_batch}
        other = run_length(sft(num_steps=None, num_epochs=2, examples_per_step=4, data=data), 10)
        assert other.steps_from(3, other.num_left(12)) == 5
