"""Rewards by the file that they are in: found from the recipe's folder, absolute in a run's config, shipped or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from grpo_ray.config.loading import to_yaml
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError, RewardError
from grpo_ray.rewards.table import resolve
from launch.run.recipe import SHIPPED, load_recipe, load_run_config
from tests.recipes import RL

SOURCE = """
import beside

class Length:
    def __init__(self, target=2):
        self.target = target
    def __call__(self, completions, **columns):
        return [float(len(c) == self.target) for c in completions]

def mine(completions, **columns):
    return [beside.VALUE] * len(completions)

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

VALUE = 3
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "my rewards.py").write_text(SOURCE)
    (folder / "code" / "beside.py").write_text("VALUE = 0.5\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    return folder


def write_recipe(file: Path, name: str) -> str:
    file.write_text(yaml.safe_dump(RL | {"reward": {"functions": [{"name": name}]}}))
    return str(file)


def loaded(file: Path, name: str, *, keep_home: bool = False) -> RewardFunctionConfig:
    return load_recipe(RunConfig, write_recipe(file, name), [], keep_home=keep_home).reward.functions[0]


@pytest.mark.parametrize(
    ("recipe", "path"),
    [
        ("code/recipe.yaml", "my rewards.py"),
        ("recipe.yaml", "code/my rewards.py"),
        ("code/recipe.yaml", "code/my rewards.py"),
        ("recipe.yaml", "~/project/code/my rewards.py"),
        ("code/recipe.yaml", "../code/my rewards.py"),
    ],
)
def test_a_file_is_found_from_the_recipe_the_folder_and_the_home(recipe: str, path: str, home: Path) -> None:
    found = loaded(home / recipe, f"{path}:mine")
    assert found.name == f"{home.resolve()}/code/my rewards.py:mine"
    assert found.title == "my_rewards.mine"
    assert not found.built_in
    assert resolve(found).call(completions=["a", "b"]) == [0.5, 0.5]


def test_the_run_keeps_the_absolute_path(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(RunConfig, write_recipe(home / "code" / "recipe.yaml", "my rewards.py:mine"), [])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    monkeypatch.chdir("/")
    again = load_run_config(RunConfig, tmp_path / "config.yaml")
    assert again == config
    assert resolve(again.reward.functions[0]).call(completions=["a"]) == [0.5]


def test_an_override_names_a_file_too(home: Path) -> None:
    recipe = write_recipe(home / "recipe.yaml", "accuracy")
    config = load_recipe(RunConfig, recipe, ["reward.functions=[{name: 'code/my rewards.py:mine', weight: 2}]"])
    assert config.reward.functions[0].name == f"{home.resolve()}/code/my rewards.py:mine"


def test_classes_and_verls_functions_are_taken_from_files(home: Path) -> None:
    file = home / "code" / "my rewards.py"
    made = resolve(RewardFunctionConfig(name=f"{file}:Length", args={"target": 3}))
    assert made.call(completions=["abc", "a"]) == [1.0, 0.0]
    assert resolve(RewardFunctionConfig(name=f"{file}:compute_score")).required[0] == ("data_source",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("code/my rewards.py", "name the function in the file.*it has Length, compute_score, mine"),
        ("code/my rewards.py:", "name the function in the file"),
        ("code/my rewards.py:mime", "has no 'mime'; did you mean 'mine'"),
        ("code/my rewards.py:VALUE", "is a int, expected a function"),
        ("code/broken.py:f", r"importing .*broken\.py, line 2 failed with SyntaxError"),
        ("code/raises.py:f", "failed with ZeroDivisionError"),
        ("code/needs.py:f", "No module named 'not_installed'"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(name: str, expected: str, home: Path) -> None:
    (home / "code" / "broken.py").write_text("x = 1\ndef f(:\n")
    (home / "code" / "raises.py").write_text("def f(completions): ...\n1 / 0\n")
    (home / "code" / "needs.py").write_text("def f(completions): ...\nimport not_installed\n")
    with pytest.raises(RewardError, match=expected):
        resolve(loaded(home / "recipe.yaml", name))


def test_a_file_that_is_not_there_is_told_with_where_it_was_looked_for(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file none\.py in .*code or in .*project"):
        loaded(home / "code" / "recipe.yaml", "none.py:f")
    with pytest.raises(ConfigError, match=r"there is no file /none/none\.py$"):
        loaded(home / "recipe.yaml", "/none/none.py:f")
    with pytest.raises(RewardError, match="every node has to see it"):
        resolve(RewardFunctionConfig(name="/nowhere/none.py:f"))


def test_a_submitted_file_is_shipped_and_named_by_its_place_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("my rewards.py:mine", "~/project/code/my rewards.py:mine", f"{home}/code/my rewards.py:mine"):
        assert loaded(home / "code" / "recipe.yaml", name, keep_home=True).name == "code/my rewards.py:mine"
    on_node = loaded(home / SHIPPED, "code/my rewards.py:mine")
    assert on_node.name == "code/my rewards.py:mine"
    assert resolve(on_node).call(completions=["a"]) == [0.5]
    monkeypatch.chdir(home / "code")
    (home / "code" / ".hidden.py").write_text(SOURCE)
    for name, expected in (("../other.py:f", "is outside of"), (".hidden.py:mine", "hidden files are not shipped")):
        (home / "other.py").write_text(SOURCE)
        with pytest.raises(ConfigError, match=expected):
            loaded(home / "code" / "recipe.yaml", name, keep_home=True)


def test_two_files_of_one_name_are_two_modules(home: Path) -> None:
    for folder, value in (("a", 1.0), ("b", 2.0)):
        (home / folder).mkdir()
        (home / folder / "r.py").write_text(
            f"def f(completions, **columns):\n    return [{value}] * len(completions)\n"
        )
    first, second = (resolve(RewardFunctionConfig(name=f"{home}/{folder}/r.py:f")) for folder in "ab")
    assert (first.call(completions=["x"]), second.call(completions=["x"])) == ([1.0], [2.0])
