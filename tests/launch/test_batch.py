"""What a job of a scheduler starts, at first and again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launch.batch import command_of
from tests.end_to_end.runs import RECIPE


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"dir": str(tmp_path / "runs")}))
    return path


def begin(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")


@pytest.mark.parametrize(("given", "name"), [([], "job-7"), (["name=a"], "a")])
def test_a_job_starts_its_run_and_goes_on_with_it_when_started_again(
    recipe: Path, tmp_path: Path, given: list[str], name: str
) -> None:
    words = ["train", str(recipe), "num_steps=3", *given]
    first = command_of(words, "job-7")
    assert first == ["train", str(recipe), "num_steps=3", f"name={name}"]
    begin(tmp_path / "runs" / name)
    assert command_of(words, "job-7") == ["resume", str(tmp_path / "runs" / name)]
    assert command_of([*words, f"dir={tmp_path}/elsewhere"], "job-7")[0] == "train"


def test_a_name_in_the_recipe_is_kept(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"name": "fixed"}))
    assert command_of(["train", str(recipe)], "job-7") == ["train", str(recipe)]
    begin(tmp_path / "runs" / "fixed")
    assert command_of(["train", str(recipe)], "job-7") == ["resume", str(tmp_path / "runs" / "fixed")]


@pytest.mark.parametrize("words", [["resume", "runs/a"], ["eval", "runs/a"], ["train"], ["check", "smoke"]])
def test_other_commands_are_as_typed(words: list[str]) -> None:
    assert command_of(words, "job-7") == words


def test_samples_and_pipelines_go_on_by_their_name_when_given_again(recipe: Path) -> None:
    assert command_of(["sample", str(recipe)], "job-7") == ["sample", str(recipe), "name=job-7"]
    assert command_of(["pipeline", "r1_tiny"], "job-7")[-1].startswith("name=") or yaml.safe_load(
        (Path("launch/recipes/r1_tiny.yaml")).read_text()
    ).get("name")
