"""Ctrl-C and SIGTERM before a run is under way: 130 or 143, one line, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LIMIT_S = 300.0
SLOW_MODULE = """
import pathlib, time
pathlib.Path("importing").touch()
time.sleep(600)

def reward(completions): ...
"""


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *args], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def interrupt(process: subprocess.Popen[str], ready: Path, number: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that is sent a signal as soon as there is this file."""
    give_up = time.monotonic() + LIMIT_S
    while not ready.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_runs_the_endings_from_the_inside_and_says_the_innermost_line(
    tmp_path: Path, number: int, code: int
) -> None:
    script = """
import pathlib, subprocess, sys, time
from launch import interrupts
interrupts.install()
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("child").write_text(str(child.pid))
with interrupts.leaving("outer", lambda: print("end of outer", flush=True)):
    with interrupts.leaving("inner"), interrupts.leaving(end=lambda: print("end of inner", flush=True)):
        with interrupts.scratch_folder() as scratch:
            pathlib.Path("scratch").write_text(str(scratch))
            try:
                pathlib.Path("ready").touch()
                time.sleep(600)
            except BaseException:
                print("unwound")
"""
    ended = interrupt(start(tmp_path, "-c", script), tmp_path / "ready", number)
    name = signal.Signals(number).name
    assert ended == (code, "end of inner\nend of outer\n", f"{name}: inner\n")
    assert not Path((tmp_path / "scratch").read_text()).exists()
    assert not Path("/proc", (tmp_path / "child").read_text()).exists()


def test_a_signal_during_the_import_of_what_it_needs_ends_children_all_the_same(tmp_path: Path) -> None:
    script = """
import pathlib, subprocess, sys, time, types
from launch import interrupts
interrupts.install()
child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $! > grandchild; wait"])
while not pathlib.Path("grandchild").exists() or not pathlib.Path("grandchild").read_text().strip():
    time.sleep(0.01)
sys.modules["psutil"] = types.ModuleType("psutil")
with interrupts.leaving("all is well"):
    pathlib.Path("ready").touch()
    time.sleep(600)
"""
    code, _, err = interrupt(start(tmp_path, "-c", script), tmp_path / "ready", signal.SIGTERM)
    assert (code, err) == (143, "SIGTERM: all is well\n")
    grandchild = Path("/proc", (tmp_path / "grandchild").read_text().strip(), "stat")
    give_up = time.monotonic() + LIMIT_S
    # A container in which nobody reaps the dead keeps it as one.
    while grandchild.exists() and " Z " not in grandchild.read_text():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_background_job_of_a_script_is_interrupted_too(tmp_path: Path) -> None:
    script = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from launch import interrupts
interrupts.install()
pathlib.Path("ready").touch()
time.sleep(600)
"""
    code, out, err = interrupt(start(tmp_path, "-c", script), tmp_path / "ready", signal.SIGINT)
    assert (code, out, err) == (130, "", "SIGINT: nothing was begun, and nothing is changed\n")


def test_an_ending_that_hangs_is_given_up(tmp_path: Path) -> None:
    script = """
import pathlib, time
from launch import interrupts
interrupts.install()
interrupts.LIMIT_S = 0.2
with interrupts.leaving("all is well", lambda: time.sleep(600)):
    pathlib.Path("ready").touch()
    time.sleep(600)
"""
    code, _, err = interrupt(start(tmp_path, "-c", script), tmp_path / "ready", signal.SIGTERM)
    assert (code, err) == (143, "SIGTERM: ended before everything was tidied up\n")


def test_handlers_that_a_library_sets_meanwhile_are_not_taken(tmp_path: Path) -> None:
    script = """
import os, pathlib, signal, sys, time
from launch import interrupts
interrupts.install()
with interrupts.kept():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    signal.signal(signal.SIGUSR1, lambda number, frame: print("mine", flush=True))
    os.kill(os.getpid(), signal.SIGUSR1)
    pathlib.Path("ready").touch()
    time.sleep(600)
"""
    code, out, err = interrupt(start(tmp_path, "-c", script), tmp_path / "ready", signal.SIGTERM)
    assert (code, out) == (143, "mine\n"), err


@pytest.mark.parametrize(
    ("command", "number", "code"), [("train", signal.SIGINT, 130), ("sample", signal.SIGTERM, 143)]
)
def test_a_command_that_still_imports_ends_with_one_line_and_leaves_nothing(
    tmp_path: Path, command: str, number: int, code: int
) -> None:
    recipe = {
        "model": {"tiny": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}, "dtype": "float32"},
        "data": {"train": {"path": "rows.jsonl"}},
        "reward": {"functions": [{"name": "slow_module.reward"}], "num_cpus": 0},
        "num_steps": 1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1 + 1 =", "answer": "2"}) + "\n")
    (tmp_path / "slow_module.py").write_text(SLOW_MODULE)
    before = sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__")
    process = start(tmp_path, "-m", "launch", command, "recipe.yaml", "name=run")
    ended, out, err = interrupt(process, tmp_path / "importing", number)
    name = signal.Signals(number).name
    assert (ended, out) == (code, "")
    assert [line for line in err.splitlines() if not line.startswith("warning")] == [
        f"{name}: nothing was begun, and nothing is changed"
    ]
    (tmp_path / "importing").unlink()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == before
