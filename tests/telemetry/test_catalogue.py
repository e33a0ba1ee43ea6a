"""The catalogue of metrics: what the code writes or reads by name is in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_ray.telemetry.catalogue import METRICS, describe, pattern_of, star
from grpo_ray.types import Prompt, ScoreStatus
from tests.loop.test_train_loop import Session, config

ROOT = Path(__file__).parents[2]
SECTIONS = {name.partition("/")[0] for name in METRICS}
NO_METRICS = {"tokens/s", "samples/s", "signal/*", "pairs/*"}
"""Units, what Health finds, and names of rows."""


_LOOKED_AT = (ast.JoinedStr, ast.Constant, ast.Dict, ast.DictComp, ast.Subscript)


def names_in(source: str) -> Iterator[str]:
    """Texts of a module that look like a metric's name: those that begin with one of the catalogue's sections, and keys of mappings
    with a slash. What is put into an f-string is a `*`."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, _LOOKED_AT)]
    inside: set[int] = set()
    keys: set[int] = set()
    for node in nodes:
        match node:
            case ast.JoinedStr():
                inside |= {id(part) for part in node.values}
            case ast.Dict():
                keys |= {id(key) for key in node.keys}
            case ast.DictComp():
                keys.add(id(node.key))
            case ast.Subscript():
                keys.add(id(node.slice))
    for node in nodes:
        match node:
            case ast.JoinedStr():
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
            case ast.Constant(value=str(text)) if id(node) not in inside:
                pass
            case _:
                continue
        is_name = re.fullmatch(r"[a-z_]+(/[\w@*.]+)+", text)
        if is_name and (id(node) in keys or text.partition("/")[0] in SECTIONS):
            yield text


def sources(package: str) -> Iterator[tuple[Path, str]]:
    for file in (ROOT / package).rglob("*.py"):
        text = file.read_text()
        if re.search(r"\"[a-z_]+/", text):
            yield file, text


def is_known(name: str) -> bool:
    """A name with `*` in it is known when it can mean a metric, or a metric's family can mean it."""
    return pattern_of(name) is not None or any(fnmatchcase(metric, name) for metric in METRICS if "*" in name)


@pytest.mark.parametrize("package", ["grpo_ray", "actors", "launch"])
def test_every_metric_that_the_code_names_is_in_the_catalogue(package: str) -> None:
    named = {name: file.name for file, text in sources(package) for name in names_in(text)}
    assert {"grpo_ray": 100, "actors": 20, "launch": 5}[package] < len(named)
    assert {name: file for name, file in named.items() if name not in NO_METRICS and not is_known(name)} == {}


def test_a_name_that_is_not_in_the_catalogue_is_found_wherever_it_is_written() -> None:
    assert list(names_in('out = {"critic/speed": 1.0}\nout["reward/sum"] = 2.0\nlog(f"time/{phase}")')) == [
        "critic/speed",
        "reward/sum",
        "time/*",
    ]
    assert [is_known(name) for name in ("critic/speed", "reward/sum", "critic/loss", "time/*")] == [
        False,
        False,
        True,
        True,
    ]


def test_all_that_a_run_tracks_is_in_the_catalogue(tmp_path: Path) -> None:
    held_out = [Prompt("held/0", [1, 2, 3], "?", None, {})]
    settings = ("num_steps=4", "algorithm.dynamic_sampling=true", "checkpoint.every_steps=2")
    session = Session(tmp_path, config(*settings, "reward.on_failure.abort_above=1"), eval_prompts=held_out)
    session.world.broken = {"ten/0/4": ScoreStatus.TIMEOUT}
    session.world.same = {"ten/0/2"}
    tracked: set[str] = set()
    session.loop.trackers = [SimpleNamespace(log=lambda step, metrics: tracked.update(metrics), close=lambda: None)]
    assert session.go() == "finished"
    assert {"groups/dropped/no_signal", "reward/r/failed", "eval/accuracy", "time/checkpoint"} <= tracked
    assert {name for name in tracked if pattern_of(name) is None} == set()


def test_a_family_says_what_its_star_stands_for() -> None:
    assert star("reward/my_rewards.short/mean", "reward/*/mean") == "my_rewards.short"
    assert star("reward/mean", "reward/mean") == ""
    assert describe("groups/dropped/poisoned") == ("Groups dropped because of poisoned", "groups")
