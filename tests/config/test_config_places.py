"""What a run writes down is right from any folder: every option that is a path, and where modules are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from grpo_ray.config.base import Strict
from grpo_ray.config.loading import build
from grpo_ray.config.places import path_options, with_places
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.run.run_dir import RunDir
from launch.run.jobs import write_config
from launch.run.recipe import SCHEMAS, load_run_config

RECIPE: dict[str, Any] = {
    "dir": "out",
    "code_dir": "code",
    "model": {"path": "models/base"},
    "data": {
        "train": {"path": "rows.jsonl"},
        "eval": {"first": {"path": "held.parquet"}, "second": {"path": "saved"}},
        "template": "prompt.jinja",
    },
    "reward": {
        "functions": [
            {"name": "reward_model", "args": {"path": "models/judge"}, "workers": {"num_actors": 1}},
            {"name": "judge", "args": {"model": "m", "cache": "answers.db", "base_url": "http://x/v1"}, "label": "j",
             "workers": {"timeout_s": 120}},
        ]
    },
    "checkpoint": {"path": "states"},
}  # fmt: skip


def sections(schema: type[Strict], prefix: str = "") -> Iterator[tuple[str, type[Strict]]]:
    yield prefix, schema
    for name, field in schema.model_fields.items():
        for inner in models_in(field.annotation):
            yield from sections(inner, f"{prefix}{name}.")


def models_in(annotation: Any) -> Iterator[type[Strict]]:
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        yield annotation
    for arg in get_args(annotation):
        yield from models_in(arg)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("models/base", "models/judge", "saved", "code"):
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("schema", SCHEMAS.values())
def test_every_option_that_is_called_a_path_is_known_as_one(schema: type[Strict]) -> None:
    for prefix, section in sections(schema):
        named = {
            n
            for n in section.model_fields
            if n in ("path", "dir", "template", "folder") or n.endswith(("_path", "_dir"))
        }
        assert named - set(path_options(section)) == set(), prefix


def test_a_relative_path_of_any_option_becomes_absolute(folder: Path) -> None:
    config = with_places(build(RunConfig, RECIPE, "test"), folder)
    found = {
        "dir": config.dir,
        "code_dir": config.code_dir,
        "model": config.model.path,
        "train": config.data.train.path,
        "eval": [source.path for source in config.data.eval_sets.values()],
        "template": config.data.template,
        "rewards": [config.reward.functions[0].args["path"], config.reward.functions[1].args["cache"]],
        "checkpoint": config.checkpoint.path,
    }
    f = str(folder)
    assert found == {
        "dir": f"{f}/out",
        "code_dir": f"{f}/code",
        "model": f"{f}/models/base",
        "train": f"{f}/rows.jsonl",
        "eval": [f"{f}/held.parquet", f"{f}/saved"],
        "template": f"{f}/prompt.jinja",
        "rewards": [f"{f}/models/judge", f"{f}/answers.db"],
        "checkpoint": f"{f}/states",
    }
    assert config.reward.functions[1].args["base_url"] == "http://x/v1"
    # Once more, from elsewhere: nothing moves.
    assert with_places(config, Path("/elsewhere")) == config


def test_names_urls_and_generators_stay_what_they_are(folder: Path) -> None:
    for changes in (
        {"model": {"path": "Qwen/Qwen2.5-0.5B"}},
        {"data": {"train": {"path": "openai/gsm8k", "name": "main"}}},
        {"data": {"train": {"path": "reasoning_gym:chain_sum"}, "template": "r1"}},
        {"data": {"train": {"path": "python:rows.make"}}},
        {"checkpoint": {"path": "s3://bucket/runs"}},
    ):
        base = {
            "model": {"path": "a/b"},
            "data": {"train": {"path": "c/d"}},
            "reward": {"functions": [{"name": "accuracy"}]},
        }
        before = build(RunConfig, base | changes, "test")
        after = with_places(before, folder)
        assert after.model_copy(update={"dir": before.dir, "code_dir": None}) == before


def test_a_reward_by_its_file_is_found_from_anywhere_and_a_dotted_one_by_its_name(folder: Path) -> None:
    names = ["rewards/mine.py:right", "pkg.pyramid.score", "accuracy"]
    recipe = RECIPE | {"reward": {"functions": [{"name": name, "label": str(i)} for i, name in enumerate(names)]}}
    found = with_places(build(RunConfig, recipe, "test"), folder).reward.functions
    assert [f.name for f in found] == [f"{folder}/rewards/mine.py:right", "pkg.pyramid.score", "accuracy"]


def test_a_link_stays_a_link(folder: Path) -> None:
    """The newest exported model of a run is one, and leads to another folder after each checkpoint."""
    (folder / "hf").symlink_to("models/base")
    recipe = RECIPE | {"model": {"path": "hf"}}
    assert with_places(build(RunConfig, recipe, "test"), folder).model.path == str(folder / "hf")


def test_what_a_run_has_written_is_read_back_the_same_from_another_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    config = build(SftConfig, {"model": {"path": "models/base"}, "data": {"train": {"path": "rows.jsonl"}}}, "test")
    run = RunDir.create(folder / "run")
    write_config(run, config)
    monkeypatch.chdir("/")
    back = load_run_config(SftConfig, run.config)
    assert back.data.train.path == str(folder / "rows.jsonl")
    assert back.code_dir == str(folder)
    assert os.path.samefile(str(back.model.path), folder / "models/base")


def test_of_a_run_on_a_cluster_paths_stay_relative_to_the_folder_that_is_shipped(folder: Path) -> None:
    config = build(SftConfig, {"model": {"path": "models/base"}, "data": {"train": {"path": "rows.jsonl"}}}, "test")
    run = RunDir.create(folder / "run")
    write_config(run, config, shipped=True)
    written = yaml.safe_load(run.config.read_text())
    assert (written["data"]["train"]["path"], written["code_dir"]) == ("rows.jsonl", None)
