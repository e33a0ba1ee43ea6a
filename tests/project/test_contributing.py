"""What contributors are told: hooks, links, and annotations that others can use."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    ".github/CONTRIBUTING.md",
    "README.md",
    "launch/README.md",
    *(f"launch/guide/{p}.md" for p in ("extend", "changelog", "gpus", "security")),
]


def test_the_hooks_before_a_commit_are_those_of_make_lint() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().removeprefix("@$(BIN)/") for line in recipe[1].splitlines()]
    assert [hook["entry"].removeprefix(".venv/bin/") for hook in hooks] == commands


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_repository_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / page).read_text())
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("package", ["grpo_ray", "actors", "launch"])
def test_each_package_ships_its_annotations(package: str) -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in data[package]


def test_every_target_of_make_that_contributors_are_told_of_is_there() -> None:
    told = set(re.findall(r"\bmake ([a-z-]+)\b", (ROOT / ".github" / "CONTRIBUTING.md").read_text()))
    there = set(re.findall(r"^([a-z-]+[a-z0-9]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert len(told) >= 5
    assert told <= there
