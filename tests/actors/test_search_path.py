"""Files of the user's that are called as ours, as Python's own modules or as libraries are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle

from actors.reward.process import ScoringProcess
from actors.search_path import worker_env
from grpo_ray.config.data import DataSource
from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.data.sources import load_table
from grpo_ray.errors import ConfigError, DataError, RewardError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.table import resolve
from grpo_ray.types import ScoreStatus
from launch.cluster.package import stage

ROOT = Path(__file__).parents[2]
NAMES = ("actors", "grpo_ray", "launch", "random", "types", "torch", "ray", "statistics", "vllm", "yaml")
REWARD = "def f(completions, **columns):\n    import random\n    return [float(len(c)) for c in completions]\n"


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every file but one ends whoever imports it; the current one."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('the user\\'s {name} was imported')\n")
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("raise SystemExit('the user\\'s datasets were imported')\n")
    (tmp_path / "mine.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    return tmp_path


def python(code: str, user: Path, python_path: str) -> subprocess.CompletedProcess[str]:
    """As the script `grpo-ray` does it, the current folder is not on the path: `-P`."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=user,
        env=dict(os.environ) | {"PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


SCRIPT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("entry", {str(ROOT / "grpo_ray" / "entry.py")!r})
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
sys.argv[1:] = ["-h"]
cli.main()
"""


def test_the_command_is_ours_in_a_folder_of_such_files_and_with_ours_hidden_on_pythonpath(user: Path) -> None:
    hidden = user / "elsewhere"
    (hidden / "launch").mkdir(parents=True)
    (hidden / "launch" / "__init__.py").write_text("raise SystemExit('the user\\'s launch')\n")
    (hidden / "actors").mkdir()
    done = python(SCRIPT, user, str(hidden))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Train by GRPO" in done.stdout


@pytest.mark.parametrize(
    ("name", "whose"), [("random.py", "Python's own module random"), ("torch.py", "the library torch")]
)
def test_a_file_on_pythonpath_that_hides_a_library_is_named(tmp_path: Path, name: str, whose: str) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / name).touch()
    done = python(SCRIPT, tmp_path, str(folder))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {folder / name} would be imported in the place of {whose}: rename it, or take {folder} off PYTHONPATH\n"
    )


def test_a_worker_has_ours_and_libraries_before_the_users_folder_though_ray_puts_that_first(user: Path) -> None:
    env = worker_env(str(user))
    (user / "hook").write_bytes(cloudpickle.dumps(env["worker_process_setup_hook"]))
    code = f"""
import pickle, sys
with open("hook", "rb") as f:
    pickle.load(f)()
# As Ray does it after the hook, at the first task.
sys.path.insert(0, {str(user)!r})
import gc, statistics, random, actors.folders, grpo_ray.names, mine
assert gc.get_threshold()[0] >= 10_000, gc.get_threshold()
assert actors.__file__.startswith({str(ROOT)!r}), actors.__file__
assert sys.path[-1] == {str(user)!r} and sys.path.count({str(user)!r}) == 1, sys.path
import multiprocessing
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=actors.folders.too_long, args=("x",))
    child.start(); child.join(30)
    assert child.exitcode == 0, child.exitcode
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=user,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env["env_vars"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("user")
def test_a_scoring_process_runs_the_users_reward_and_none_of_those_files() -> None:
    process = ScoringProcess(RewardConfig(functions=(RewardFunctionConfig(name="mine.f"),)))
    try:
        process.start()
        inputs = ScoreInputs(["p"], ["four"], [[1, 2]])
        [[score]] = process.run([(0, inputs)])
        assert (score.status, score.value) == (ScoreStatus.OK, 4.0)
    finally:
        process.stop()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("actors.my_reward.f", r"the name actors is taken by grpo-ray's own package .*; rename .*actors"),
        ("actors.f", r"the name actors is taken by grpo-ray's own package"),
        ("types.f", r"the name types is taken by Python's own module .*; rename .*types"),
        ("yaml.my_reward.f", r"no module 'yaml.my_reward': the name yaml is taken by a library"),
        ("uses.f", r"cannot import name 'helper' from 'actors' .*; the name actors is taken"),
        ("uses_more.f", r"there is no module 'actors.helpers': the name actors is taken"),
    ],
)
def test_a_reward_under_a_name_that_is_taken_is_refused_with_the_reason(user: Path, reward: str, expected: str) -> None:
    (user / "uses.py").write_text("from actors import helper\ndef f(completions): ...\n")
    (user / "uses_more.py").write_text("import actors.helpers\ndef f(completions): ...\n")
    with pytest.raises(RewardError, match=expected):
        resolve(RewardFunctionConfig(name=reward))


@pytest.mark.usefixtures("user")
def test_rows_from_a_module_under_a_name_that_is_taken_are_refused_with_the_reason() -> None:
    with pytest.raises(DataError, match=r"the name types is taken by Python's own module"):
        load_table(DataSource(path="python:types.rows"), seed=1)


@pytest.mark.parametrize("name", ["random.py", "torch.py", "actors.py", "types/__init__.py"])
def test_what_would_hide_a_library_on_the_cluster_is_not_shipped(tmp_path: Path, name: str) -> None:
    user = tmp_path / "user"
    (user / name).parent.mkdir(parents=True)
    (user / name).touch()
    with pytest.raises(ConfigError, match="rename it"):
        stage(user, tmp_path / "staged")
    if name != "actors.py":
        stage(user, tmp_path / "without", [Path(name).parts[0]])
