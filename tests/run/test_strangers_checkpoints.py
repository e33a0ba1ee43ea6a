"""Checkpoints, models and run folders from strangers: what their files name is inside of them and a regular file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.errors import CheckpointError, ConfigError
from grpo_ray.models.files.loading import check_model_path, known_context
from grpo_ray.pipeline.record import Record
from grpo_ray.run import manifest
from grpo_ray.run.checkpoint_store import Store, step_of_name
from grpo_ray.run.ended import read_ended
from grpo_ray.run.eval_record import step_of
from grpo_ray.run.learner_files import SavedLearner
from grpo_ray.run.run_dir import RunDir

pytestmark = pytest.mark.timeout(60)
OUTSIDE = [
    "../../../../dev/zero",
    "../../etc/hostname",
    "/etc/hostname",
    "hf/../../x",
    "./x",
    "a//b",
    "..",
    "",
    "a\\..\\b",
    "a\x1b]52;c;aGk=\x07",
    "a\nb",
    "\u202egpj.exe",
    "x" * 5000,
]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with a checkpoint of step 3."""
    run = RunDir(tmp_path / "run")
    place = run.store.begin(3)
    with place.filling("loop") as (folder, sums):
        (folder / "loop.json").write_text('{"step": 3}')
    run.store.commit(place, 3, sums, keep=None)
    assert run.latest_valid_step(print) == 3
    return run


def folder_of(run: RunDir) -> Path:
    return Path(run.place(3).url)


def rewrite(run: RunDir, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder_of(run) / manifest.NAME
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def told_broken(run: RunDir) -> str:
    told: list[str] = []
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        run.latest_valid_step(told.append)
    assert len(told) == 1
    assert all(c.isprintable() for c in told[0]), "a manifest's own words reach a terminal"
    return told[0]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_nothing_outside_of_its_checkpoint(name: str, run: RunDir) -> None:
    rewrite(run, lambda content: content["files"].update({name: asdict(manifest.FileSum(1, "0" * 64))}))
    assert "names a file" in told_broken(run)


@pytest.mark.parametrize(
    "entry",
    [
        {"size": 1 << 60, "sha256": "0" * 64},
        {"size": -1, "sha256": "0" * 64},
        {"size": "1", "sha256": "0" * 64},
        {"size": True, "sha256": "0" * 64},
        {"size": 1.5, "sha256": "0" * 64},
        {"size": 1, "sha256": "\x1b[2J"},
        {"size": 1, "sha256": None},
        {"size": 1},
        [],
        None,
    ],
)
def test_sizes_and_sums_of_a_manifest_are_what_they_can_be(entry: Any, run: RunDir) -> None:
    rewrite(run, lambda content: content["files"].update({"loop/loop.json": entry}))
    told_broken(run)


@pytest.mark.parametrize(
    "content", ["[" * 200_000, "[]", "null", "7", '{"files": []}', '{"format": 1, "step": 3, "files": 1}']
)
def test_a_manifest_that_is_none_is_told(content: str, run: RunDir) -> None:
    (folder_of(run) / manifest.NAME).write_text(content)
    told_broken(run)


def link(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(shutil.disk_usage(path.parent).total + 1)


@pytest.mark.parametrize("make", [link("/dev/zero"), link("/etc/hostname"), os.mkfifo, sparse, Path.mkdir])
@pytest.mark.parametrize("name", ["loop/loop.json", manifest.NAME])
def test_links_out_of_a_checkpoint_pipes_and_endless_files_are_not_read(
    make: Callable[[Path], Any], name: str, run: RunDir
) -> None:
    path = folder_of(run) / name
    path.unlink()
    try:
        make(path)
    except OSError as e:
        pytest.skip(f"not on this disk: {e}")
    told_broken(run)


def test_a_link_of_the_folder_above_leads_no_file_out(run: RunDir, tmp_path: Path) -> None:
    shutil.move(folder_of(run) / "loop", tmp_path / "elsewhere")
    (folder_of(run) / "loop").symlink_to(tmp_path / "elsewhere")
    assert "leads out of" in told_broken(run)


@pytest.mark.parametrize("number", [True, 1.0, "1", None, [1]])
@pytest.mark.parametrize("key", ["step", "format"])
def test_numbers_of_a_manifest_are_whole_numbers_and_nothing_that_equals_them(key: str, number: Any) -> None:
    content = json.loads(manifest.to_json(1, {"a": manifest.FileSum(1, "0" * 64)}))
    assert manifest.from_json(json.dumps(content).encode(), 1)
    with pytest.raises(ValueError, match=f"is of {key}"):
        manifest.from_json(json.dumps({**content, key: number}).encode(), 1)


@pytest.mark.parametrize("name", ["step-foo", "step-3", "step-", "step-" + "\u0663" * 6, "step-0000003", "step-1e9"])
def test_folders_that_are_called_almost_like_a_step_are_none(name: str, run: RunDir) -> None:
    shutil.copytree(folder_of(run), folder_of(run).parent / name)
    assert Store(run.store.url).steps() == [3]
    assert step_of_name(name) is None
    assert step_of(run.path / name / "hf") is None
    assert run.latest_valid_step(print) == 3


@pytest.mark.parametrize(
    "state",
    [
        {"num_ranks": 10**12, "facts": {}, "models": {}},
        {"num_ranks": "1", "facts": {}, "models": {}},
        {"num_ranks": 1, "facts": {}, "models": {"../../../etc/x": {"extents": {}}}},
        {"num_ranks": 1, "facts": {}, "models": {"policy": {"extents": {"w": [-5, 10]}}}},
        {"num_ranks": 1, "facts": {}, "models": {"policy": {"extents": {"w": 3}}}},
        {"num_ranks": 1, "facts": []},
        [],
        "x",
    ],
)
def test_a_learners_state_that_was_not_written_so_is_told(state: Any, run: RunDir) -> None:
    rank = folder_of(run) / "learner" / "rank-0"
    rank.mkdir(parents=True)
    (rank / "state.json").write_text(json.dumps(state))
    with run.place(3).reading() as files, pytest.raises(CheckpointError, match="holds no learner checkpoint"):
        SavedLearner.open(files)


def test_a_learners_file_that_leads_out_is_not_read(run: RunDir) -> None:
    rank = folder_of(run) / "learner" / "rank-0"
    rank.mkdir(parents=True)
    (rank / "state.json").symlink_to("/etc/hostname")
    with run.place(3).reading() as files, pytest.raises(CheckpointError, match="leads out of"):
        files.local("learner/rank-0/state.json")


@pytest.mark.parametrize("shard", ["../../../../../../dev/zero", "/etc/hostname", "../model.safetensors"])
def test_an_index_of_weights_names_files_of_its_folder_alone(shard: str, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(ConfigError, match="not one inside of its folder"):
        check_model_path(str(model))


@pytest.mark.parametrize("make", [os.mkfifo, link("/dev/zero")])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_models_pipes_and_devices_are_not_read(
    make: Callable[[Path], Any], name: str, tiny_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / name).unlink()
    make(model / name)
    with pytest.raises(ConfigError, match=r"no regular file|no weights|without config\.json"):
        check_model_path(str(model))
    from grpo_ray.config.model import ModelConfig

    if name == "config.json":
        assert known_context(ModelConfig(path=str(model))) is None


@pytest.mark.parametrize("make", [os.mkfifo, link("/dev/zero")])
def test_records_of_a_run_that_are_pipes_or_devices_are_not_read(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "ended.json")
    assert read_ended(tmp_path) is None
    make(tmp_path / "pipeline.json")
    assert Record.open(tmp_path).stages == {}


@pytest.mark.parametrize("step", ["7", None, [], 1.5])
def test_an_end_that_was_not_written_so_is_none(step: Any, tmp_path: Path) -> None:
    ended = {"status": "finished", "text": "", "step": step, "total_steps": 7, "length": []}
    (tmp_path / "ended.json").write_text(json.dumps(ended))
    assert read_ended(tmp_path) is None
