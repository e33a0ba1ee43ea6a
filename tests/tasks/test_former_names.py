"""Recipes, users' modules and run folders that name the tasks as they were called before."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from grpo_ray.config.data import DataSource
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.data.sources import load_table
from grpo_ray.errors import DataError
from grpo_ray.rewards.table import resolve
from grpo_ray.user_code.functions import of_file, of_module
from grpo_ray.user_code.places import FORMER, ROOT

ROWS = {"grpo_ray.tiny_arithmetic": "flawed_demonstrations", "grpo_ray.tiny_r1": "greetings"}


@pytest.mark.parametrize("former", FORMER)
def test_a_recipe_of_before_gets_the_same_rows_and_they_are_no_code_of_the_recipe(former: str) -> None:
    was, now = (
        list(load_table(DataSource(path=f"python:{name}.{ROWS[former]}", args={"size": 20, "seed": 3}), seed=1).rows)
        for name in (former, FORMER[former])
    )
    assert was == now
    assert len(was) == 20
    assert not of_module(f"{former}.{ROWS[former]}", None).foreign


def test_a_reward_of_before_is_the_same_function() -> None:
    was, now = (
        resolve(RewardFunctionConfig(name=f"{m}.kind_greeting")) for m in ("grpo_ray.tiny_r1", "grpo_ray.tasks.r1")
    )
    assert was.call is now.call


@pytest.mark.parametrize("former", FORMER)
def test_users_modules_import_all_that_is_public_by_the_former_name(former: str) -> None:
    was, now = importlib.import_module(former), importlib.import_module(FORMER[former])
    defined = {
        n for n, v in vars(now).items() if getattr(v, "__module__", None) == now.__name__ and not n.startswith("_")
    }
    assert {n: getattr(was, n) for n in was.__all__} == {n: getattr(now, n) for n in defined}


@pytest.mark.parametrize("former", FORMER)
def test_a_users_function_that_takes_its_name_from_there_is_found(
    former: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(f"from {former} import {ROWS[former]} as rows\n")
    monkeypatch.chdir(tmp_path)
    assert of_file(tmp_path / "mine.py", "rows").load() is getattr(
        importlib.import_module(FORMER[former]), ROWS[former]
    )


@pytest.mark.parametrize("former", FORMER)
def test_the_file_of_before_lends_its_functions_too(former: str) -> None:
    file = ROOT / f"{former.replace('.', '/')}.py"
    assert of_file(file, ROWS[former]).load() is getattr(importlib.import_module(FORMER[former]), ROWS[former])


def test_a_name_that_is_not_there_is_told_with_the_one_that_is() -> None:
    with pytest.raises(DataError, match="did you mean 'flawed_demonstrations'"):
        load_table(DataSource(path="python:grpo_ray.tiny_arithmetic.flawed_demonstration"), seed=1)
