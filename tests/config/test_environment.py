"""The section `environment`: what it takes, what it refuses, and where its files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.places import with_places
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError


def config_of(environment: dict[str, Any], **options: Any) -> RunConfig:
    base = {"model": {"path": "m"}, "data": {"template": "chat", "train": {"path": "rows.jsonl"}}, "num_steps": 1}
    return build(RunConfig, {**base, "environment": environment, **options}, "the test")


def test_an_environment_gives_the_reward_of_a_run_without_functions() -> None:
    config = config_of({"classes": {"a": {"name": "games.A"}, "b": {"name": "games.py:B"}}})
    assert config.reward_titles == ["A", "B"]
    assert list(config.reward_pools) == ["reward"]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "names no class and no tools"),
        ({"name": "Game"}, "'Game', and none is built in"),
        ({"name": "g.A", "classes": {"b": {"name": "g.B"}}}, "both name and classes"),
        ({"tools": ["g.f"], "args": {"x": 1}}, r"environment\.args belongs to environment\.name"),
        ({"tools": ["g.f"]}, "reward.functions is empty"),
        ({"name": "g.A", "step_timeout_s": 700}, r"step_timeout_s \(700\) is above environment.episode_timeout_s"),
        ({"name": "g.A", "episode_timeout_s": 1000}, r"more than half of deadlines.sample_s"),
        ({"name": "g.A", "num_envs": 0}, "num_envs"),
    ],
)
def test_what_can_not_work_is_refused_with_its_cause(environment: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        config_of(environment)


def test_an_environment_needs_a_chat_template_for_its_turns() -> None:
    data = {"template": "raw", "train": {"path": "rows.jsonl"}}
    with pytest.raises(ConfigError, match="needs a chat template"):
        config_of({"name": "g.A"}, data=data)


def test_a_reward_and_an_environment_of_one_name_are_told_apart() -> None:
    with pytest.raises(ConfigError, match="give the function a label"):
        config_of({"name": "games.A"}, reward={"functions": [{"name": "x.y", "label": "A"}]})


def test_files_of_environments_get_absolute_paths_and_modules_keep_their_names(tmp_path: Path) -> None:
    placed = with_places(config_of({"name": "games.py:A", "tools": ["tools.f", "t.py:g"]}), tmp_path).environment
    assert placed is not None
    assert placed.name == f"{tmp_path}/games.py:A"
    assert placed.tools == ("tools.f", f"{tmp_path}/t.py:g")


@pytest.mark.parametrize(
    ("key", "ours"),
    [("environment_factory", "environment.name"), ("max_tool_calling_iterations", "environment.max_turns")],
)
def test_trls_names_lead_to_ours(key: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"called {ours} here"):
        config_of({"name": "g.A"}, **{key: 1})
