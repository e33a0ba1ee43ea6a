"""launch/guide/extend.md: its examples, taken from the page, do what it says."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grpo_ray.algorithm.train_batch import set_advantages
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.sources import load_table
from grpo_ray.rewards.table import resolve
from grpo_ray.types import Group
from launch.check.command import check_recipe
from launch.run.recipe import load_recipe
from tests.algorithm.test_train_batch import group
from tests.naive_losses import make_batch
from tests.packed import gradient, run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "launch" / "guide" / "extend.md"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """Of the page's recipe, in a folder with all of its files."""
    blocks = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == [
        "recipe.yaml",
        "my_losses.py",
        "my_advantages.py",
        "my_rewards.py",
        "my_data.py",
    ]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield load_recipe(RunConfig, "recipe.yaml", [])
    for name, _ in blocks:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.usefixtures("config")
def test_check_takes_the_pages_recipe_and_names_its_functions(capsys: pytest.CaptureFixture[str]) -> None:
    check_recipe("recipe.yaml", [])
    assert capsys.readouterr().out.count("read, not run") == 4
    check_recipe("recipe.yaml", [], run_code=True)
    assert "64 of 64 prompts" in capsys.readouterr().out


def test_the_pages_loss_is_the_capped_reinforce_that_it_says(config: RunConfig) -> None:
    b = make_batch(2)
    got, metrics = run(config.algorithm, b)
    total, tokens, capped = 0.0, sum(b.lengths), 0
    slopes = []
    for theta, old, advantage in zip(b.theta, b.old, b.advantages, strict=True):
        for x, y in zip(theta.tolist(), old.tolist(), strict=True):
            ratio = torch.tensor(x - y, dtype=torch.float64).exp().item()
            slopes.append(-min(ratio, 1.2) * advantage / tokens)
            total += slopes[-1] * x
            capped += ratio > 1.2
    assert got.item() == pytest.approx(total)
    assert gradient(got, b)[:tokens].tolist() == pytest.approx(slopes)
    assert metrics["clip/high"] == pytest.approx(capped / tokens)
    assert capped > 0


def test_the_pages_advantage_is_the_distance_to_the_median(config: RunConfig) -> None:
    groups: list[Group] = [group([0.0, 0.2, 1.0, float("nan")], ["stop"] * 4), group([0.5] * 4, ["stop"] * 4)]
    set_advantages(groups, config.algorithm)
    assert groups[0].advantages == pytest.approx([-0.2, 0.0, 0.8, 0.0])
    assert groups[1].advantages == [0.0] * 4


def test_the_pages_reward_and_data_go_together(config: RunConfig) -> None:
    table = load_table(config.data.train, seed=0)
    assert len(table.rows) == 64
    assert table.rows[1] == {"prompt": "7 + 3 =", "answer": "10"}
    reward = resolve(config.reward.functions[0])
    answers = [row["answer"] for row in table.rows[:2]]
    assert reward.call(completions=["no", "it is 10" + "!" * 20], answer=answers, **reward.args) == [0.0, 0.5]


def test_the_page_is_linked() -> None:
    assert "(launch/guide/extend.md)" in (ROOT / "README.md").read_text()
    assert "(guide/extend.md)" in (ROOT / "launch" / "README.md").read_text()
