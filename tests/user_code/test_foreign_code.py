"""A recipe or a run's folder from a stranger: whose functions it may name, and that `check` runs none of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml

import grpo_ray
from grpo_ray.config.data import DataSource
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.data.sources import load_table
from grpo_ray.errors import DataError, GrpoRayError, RewardError
from grpo_ray.rewards.table import described, resolve
from launch.check.command import check_recipe
from launch.pipeline.stages import run_pipeline
from launch.run.jobs import evaluate_target, resume_run
from tests.recipes import RL

MINE = """
import functools
import os
import subprocess
import subprocess as sub
from os import system
from subprocess import *
from importlib import import_module
from pathlib import Path

alias = subprocess.check_output
again = alias
spelled = sub.check_output
found = getattr(subprocess, "check_output")
part = functools.partial(subprocess.check_output)
method = Path("CANARY").touch
evaluate = eval
imported = import_module("subprocess").check_output
load = __import__("numpy").load
try:
    from shutil import rmtree as either
except ImportError:
    def either(completions): ...

def __getattr__(name):
    return getattr(subprocess, name)

class Outer:
    @staticmethod
    def inner(args): subprocess.check_output(args)
"""
FOREIGN = [
    "subprocess.check_output",
    "os.system",
    "os.path.os.system",
    "posix.system",
    "builtins.eval",
    "builtins.exec",
    "__main__.exit",
    "runpy.run_path",
    "importlib.import_module",
    "test.support.run_with_locale",
    "numpy.load",
    "torch.load",
    "torch.hub.load",
    "transformers.pipeline",
    "yaml.unsafe_load",
    "psutil.Popen",
    "pip.main",
    "pytest.main",
    "grpo_ray.files.write_whole",
    "grpo_ray.user_code.files.file_module",
    "grpo_ray.rewards.code.code",
    "grpo_ray.tasks.r1.random.seed",
    "grpo_ray.tasks.r1.dataclass",
    "grpo_ray.tasks.arithmetic.Iterator",
    "grpo_ray.tiny_r1.random.seed",
    "grpo_ray.tiny_arithmetic.Iterator",
    "launch.run.jobs.resume_run",
    "actors.cluster.connect",
    *(
        f"mine.{name}"
        for name in ("os.system", "subprocess.check_output", "system", "alias", "again", "spelled", "found")
    ),
    *(f"mine.{name}" for name in ("part", "method", "evaluate", "imported", "load", "either", "check_output", "Popen")),
    *("mine.Outer.inner", "mine.sub", "mine.functools", "mine.run", "mine.__builtins__.exec"),
    *("pkg.system", "pkg.inner.system", "pkg.deep"),
]
FILES: list[Callable[[Path], Any]] = [
    lambda here: subprocess.__file__,
    lambda here: numpy.__file__,
    lambda here: Path(grpo_ray.__file__).with_name("files.py"),
    lambda here: "/usr/share/gdb/auto-load/tool.py",
    lambda here: "/usr/lib/llvm-14/build/utils/lit/lit/util.py",
    lambda here: here / "link.py",
    lambda here: here / "copied_python" / "subprocess.py",
    lambda here: here / "installed" / "tool.py",
    lambda here: here / ".venv" / "lib" / "python3.11" / "site-packages" / "tool.py",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a stranger's modules in it."""
    folder = tmp_path / "here"
    (folder / "pkg").mkdir(parents=True)
    (folder / "mine.py").write_text(MINE)
    (folder / "pkg" / "__init__.py").write_text("from .inner import system\nfrom .inner import again as deep\n")
    (folder / "pkg" / "inner.py").write_text("from os import system\nfrom subprocess import call as again\n")
    (folder / "link.py").symlink_to(subprocess.__file__)
    for name in ("copied_python", "installed", ".venv/lib/python3.11/site-packages"):
        (folder / name).mkdir(parents=True)
        (folder / name / "tool.py").write_text("def check_output(args): open('CANARY', 'w')\n")
    (folder / "copied_python" / "encodings").mkdir()
    (folder / "copied_python" / "os.py").touch()
    shutil.copy(subprocess.__file__, folder / "copied_python")
    (folder / "installed" / "tool-1.0.dist-info").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        if name.partition(".")[0] in ("mine", "pkg", "loud", "shown", "tool"):
            del sys.modules[name]


def canary(folder: Path) -> dict[str, Any]:
    return {"args": ["touch", str(folder / "CANARY")]}


def refused(folder: Path, call: Callable[[], Any], error: type[GrpoRayError]) -> str:
    with pytest.raises(error) as told:
        call()
    assert not (folder / "CANARY").exists()
    return str(told.value)


@pytest.mark.parametrize("name", FOREIGN)
def test_functions_of_python_of_libraries_and_of_grpo_ray_are_no_rewards_and_no_data(name: str, here: Path) -> None:
    top = name.partition(".")[0]
    for package in (None, top):
        reward = RewardFunctionConfig(name=name, args=canary(here), package=package)
        said = refused(here, partial(resolve, reward), RewardError)
        assert said.startswith(f"reward {name!r}: ")
        source = DataSource(path=f"python:{name}", args=canary(here), package=package)
        assert refused(here, partial(load_table, source, seed=1), DataError).startswith(f"python:{name}: ")


@pytest.mark.parametrize("file", FILES)
def test_files_of_python_of_packages_and_of_grpo_ray_are_no_rewards(file: Callable[[Path], Any], here: Path) -> None:
    reward = RewardFunctionConfig(name=f"{file(here)}:check_output", args=canary(here))
    refused(here, lambda: resolve(reward), RewardError)


@pytest.mark.parametrize("above", [".", ".."])
@pytest.mark.parametrize("left", ["mine-1.0.dist-info", "x.egg-info"])
def test_what_an_installation_left_in_the_working_folder_makes_no_package_of_it(
    left: str, above: str, here: Path
) -> None:
    (here / above / left).mkdir()
    code = "def f(completions, **_):\n    return [1.0] * len(completions)\n"
    (here / "own.py").write_text(code)
    (here / "pkg/mine.py").write_text(code)
    for name in ("own.f", "own.py:f", f"{here}/own.py:f", "pkg.mine.f", "pkg/mine.py:f"):
        assert described(RewardFunctionConfig(name=name), imports=False).name == RewardFunctionConfig(name=name).title
    listed = f"{here.name}/own.py" if above == ".." else "own.py"
    (here / above / left / "RECORD").write_text(f"{listed},sha256=x,1\n")
    if left.endswith(".dist-info"):
        with pytest.raises(RewardError, match="of an installed package"):
            described(RewardFunctionConfig(name="own.py:f"), imports=False)
    assert described(RewardFunctionConfig(name="pkg.mine.f"), imports=False).name == "pkg.mine.f"


@pytest.mark.parametrize("name", ["system", "alias", "found", "part", "evaluate", "check_output"])
def test_a_file_of_the_users_lends_its_name_to_nothing_that_it_imports(name: str, here: Path) -> None:
    reward = RewardFunctionConfig(name=f"{here / 'mine.py'}:{name}", args=canary(here))
    refused(here, lambda: resolve(reward), RewardError)


def test_a_code_folder_of_a_strangers_makes_no_installed_package_the_users(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here / "installed"))
    monkeypatch.syspath_prepend(here / "installed")
    reward = RewardFunctionConfig(name="tool.check_output", args=canary(here))
    assert "package: tool" in refused(here, lambda: resolve(reward), RewardError)
    named = reward.model_copy(update={"package": "tool"})
    assert "a library's" in refused(here, lambda: resolve(named), RewardError)


def test_a_package_that_the_recipe_names_is_called(here: Path) -> None:
    reward = RewardFunctionConfig(name="trl.rewards.think_format_reward")
    assert "package: trl" in refused(here, lambda: resolve(reward), RewardError)
    shown = described(reward.model_copy(update={"package": "trl"}), imports=False)
    assert shown.accepts is None or "completions" in shown.accepts
    sneaky = RewardFunctionConfig(name="trl.rewards.accuracy_rewards.parse", package="trl")
    refused(here, lambda: resolve(sneaky), RewardError)


SHOWN = """
import functools

def plain(completions, level, k=1): return [k] * len(completions)
aliased = plain
made = functools.partial(plain, k=2)
@functools.lru_cache
def decorated(completions, **columns): return [1.0]
def maker(size=3):
    return lambda completions, **columns: [size]
curried = maker(4)
class Length:
    def __init__(self, target): self.target = target
    def __call__(self, completions, *, grade=None, **columns): return [self.target]
class Longer(Length): ...
async def later(completions, grade): return [0.0]
def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 1.0
if True:
    def inside(completions, level): return [0.0]
"""


@pytest.mark.parametrize(
    ("name", "args", "known"),
    [
        ("plain", {"k": 2}, True),
        ("aliased", {}, True),
        ("made", {}, False),
        ("decorated", {}, True),
        ("maker", {"size": 2}, False),
        ("curried", {}, False),
        ("Length", {"target": 1}, True),
        ("Longer", {"target": 1}, False),
        ("later", {}, True),
        ("compute_score", {}, True),
        ("inside", {}, True),
    ],
)
def test_what_the_source_tells_is_what_importing_tells(
    name: str, args: dict[str, Any], known: bool, here: Path
) -> None:
    (here / "shown.py").write_text(SHOWN)
    reward = RewardFunctionConfig(name=f"shown.{name}", args=args)
    shown = described(reward, imports=False)
    assert "shown" not in sys.modules
    imported = described(reward)
    if known:
        assert (shown.accepts, shown.required, shown.args) == (imported.accepts, imported.required, imported.args)
    else:
        assert (shown.accepts, shown.required) == (None, ())


LOUD = """
from pathlib import Path
Path("IMPORTED").touch()

def reward(completions, level=0): Path("CALLED").touch(); return [0.0] * len(completions)
def make(): Path("CALLED").touch(); return lambda completions: [0.0]
def rows():
    Path("CALLED").touch()
    return [{"prompt": "1 + 1", "answer": "2"}] * 40
"""


@pytest.fixture
def recipe(here: Path) -> Path:
    (here / "loud.py").write_text(LOUD)
    recipe = RL | {
        "data": {"train": {"path": "python:loud.rows"}},
        "reward": {
            "functions": [{"name": "loud.reward"}, {"name": "loud.make"}, {"name": "loud.py:reward", "label": "file"}]
        },
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return here


def test_check_names_a_recipes_code_and_runs_it_only_when_told_to(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_recipe("recipe.yaml", [])
    out = "".join(capsys.readouterr().out.split())
    assert not (recipe / "IMPORTED").exists()
    assert out.count("loud.py:read,notrun") == 4
    assert "--run-code" in out
    check_recipe("recipe.yaml", [], run_code=True)
    assert (recipe / "CALLED").exists()
    assert "40of40prompts" in "".join(capsys.readouterr().out.split())


def test_check_and_a_dry_run_of_a_pipeline_run_no_code_of_its_stages(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = yaml.safe_load((recipe / "recipe.yaml").read_text())
    (recipe / "stages.yaml").write_text(yaml.safe_dump({"stages": {"zero": {"kind": "train", "config": run}}}))
    check_recipe("stages.yaml", [])
    run_pipeline("stages.yaml", [], None, None, dry_run=True)
    assert not (recipe / "IMPORTED").exists()
    assert "".join(capsys.readouterr().out.split()).count("loud.py:read,notrun") == 8


def test_check_runs_no_python_file_of_a_model(
    recipe: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = recipe / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text()) | {
        "auto_map": {"AutoConfig": "conf.C"},
        "model_type": "own",
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "conf.py").write_text("from pathlib import Path\nPath('IMPORTED').touch()\n")
    check_recipe("recipe.yaml", ["model={path: model, tiny: null, trust_remote_code: true}"])
    assert not (recipe / "IMPORTED").exists()
    assert "Pythonfilesof" in "".join(capsys.readouterr().out.split())


ATTACKS = [
    {"data": {"train": {"path": "python:subprocess.check_output", "args": {"args": ["touch", "CANARY"]}}}},
    {"reward": {"functions": [{"name": "os.system", "args": {"command": "touch CANARY"}}]}},
    {"reward": {"functions": [{"name": "mine.alias", "args": {"args": ["touch", "CANARY"]}}]}},
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_check_resume_and_eval_refuse_what_no_recipe_may_name(attack: dict[str, Any], here: Path) -> None:
    config = {**RL, "data": {"train": {"path": "rows.jsonl"}}, **attack}
    (here / "rows.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n')
    (here / "recipe.yaml").write_text(yaml.safe_dump(config))
    run = here / "runs" / "strangers"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "code_dir": str(Path(subprocess.__file__).parent)}))
    refused(here, lambda: check_recipe("recipe.yaml", []), GrpoRayError)
    refused(here, lambda: resume_run(run, []), GrpoRayError)
    refused(here, lambda: evaluate_target("recipe.yaml", ["data.eval.path=rows.jsonl"]), GrpoRayError)
