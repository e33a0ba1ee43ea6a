"""Which Python the set-up takes, and what it does where there is none: the script itself, with interpreters of straw."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from launch.lock import merged, pinned

ROOT = Path(__file__).parent.parent
TOOLS = ["bash", "env", "dirname", "cat", "mkdir", "chmod", "id", "df", "awk", "grep", "sed", "tr"]
INTERPRETER = """#!/bin/bash
echo "$0 $*" >>"$TOLD"
case "$1 $2" in
    "-c import venv"*) exit {no_venv};;
    "-c "*) exit {unsuitable};;
    "-m venv") mkdir -p "$3/bin"; printf '#!/bin/bash\\n' >"$3/bin/python"; chmod +x "$3/bin/python";;
esac
"""
UV = """#!/bin/bash
echo "uv $*" >>"$TOLD"
case "$1" in
    python) echo /there;;
    venv)
        for last; do :; done
        mkdir -p "$last/bin"
        printf '#!/bin/bash\\n' >"$last/bin/python"
        chmod +x "$last/bin/python";;
esac
exit ${UV_FAILS:-0}
"""


class Machine:
    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        (folder / "launch").mkdir()
        self.bin.mkdir()
        shutil.copy(ROOT / "launch" / "install.sh", folder / "launch")
        for tool in TOOLS:
            path = shutil.which(tool)
            assert path is not None
            (self.bin / tool).symlink_to(path)
        for tool in ("g++", "bwrap"):
            self.put(tool, "#!/bin/bash\n")

    def put(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def python(self, name: str, *, suits: bool = True, venv: bool = True) -> None:
        self.put(name, INTERPRETER.format(unsuitable=int(not suits), no_venv=int(not venv)))

    def install(self, **env: str) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": str(self.bin),
            "HOME": str(self.folder),
            "TOLD": str(self.folder / "told"),
            "GRPO_RAY_GPU": "no",
        } | env
        command = [str(self.bin / "bash"), "launch/install.sh", "python"]
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=60
        )

    @property
    def told(self) -> str:
        return (self.folder / "told").read_text()

    @property
    def is_set_up(self) -> bool:
        return (self.folder / ".venv" / "bin" / "python").is_file()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("name", ["python3.11", "python3.12", "python3.13", "python3"])
def test_any_python_that_suits_is_taken(machine: Machine, name: str) -> None:
    if name != "python3":
        machine.python("python3", suits=False)
    machine.python(name)
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert f"bin/{name} -m venv .venv" in machine.told
    assert machine.is_set_up


def test_the_oldest_that_suits_is_taken_and_one_without_venv_is_passed_over(machine: Machine) -> None:
    for name in ("python3.13", "python3.12"):
        machine.python(name)
    machine.python("python3.11", venv=False)
    assert machine.install().returncode == 0
    assert "bin/python3.12 -m venv .venv" in machine.told


@pytest.mark.parametrize(
    ("suits", "said"), [(False, "no Python 3.11, 3.12 or 3.13 was found"), (True, "python3 has no venv")]
)
def test_without_one_uv_brings_its_own_and_it_is_said_how_to_avoid_that(
    machine: Machine, suits: bool, said: str
) -> None:
    machine.python("python3", suits=suits, venv=False)
    machine.put("uv", UV)
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert "uv venv -q --seed --managed-python --python 3.11 .venv" in machine.told
    for part in (said, "uv brings a Python 3.11 of its own", "/there", "make PYTHON=/path/to/python3.12"):
        assert part in done.stdout
    assert machine.is_set_up


def test_what_can_not_be_had_is_told_with_the_way_out(machine: Machine) -> None:
    done = machine.install()
    assert (done.returncode, machine.is_set_up) == (1, False)
    assert "uv is not here and could not be had" in done.stderr
    machine.put("uv", UV)
    done = machine.install(UV_FAILS="2")
    assert done.returncode == 1
    assert "uv could not bring its Python" in done.stderr


def test_a_python_that_was_named_is_taken_or_refused(machine: Machine) -> None:
    machine.python("python3.11")
    machine.python("mine")
    machine.python("old", suits=False)
    done = machine.install(PYTHON="old")
    assert done.returncode == 1
    assert "PYTHON=old is no Python 3.11, 3.12 or 3.13" in done.stderr
    assert machine.install(PYTHON="mine").returncode == 0
    assert "bin/mine -m venv .venv" in machine.told


def test_a_python_may_be_in_a_folder_with_a_space(machine: Machine) -> None:
    folder = machine.bin / "my pythons"
    folder.mkdir()
    machine.python("my pythons/python")
    done = machine.install(PYTHON=str(folder / "python"))
    assert done.returncode == 0, done.stderr
    assert f"{folder}/python -m venv .venv" in machine.told


def test_an_environment_of_another_python_is_refused_and_left_as_it_is(machine: Machine) -> None:
    machine.python("python3.11")
    (machine.folder / ".venv" / "bin").mkdir(parents=True)
    machine.python("../.venv/bin/python", suits=False)
    done = machine.install()
    assert done.returncode == 1
    assert "the .venv here is of " in done.stderr
    assert "rm -rf .venv" in done.stderr
    assert "-m venv" not in machine.told
    assert machine.is_set_up
    machine.python("../.venv/bin/python")
    assert machine.install().returncode == 0


def test_whether_there_is_a_gpu_is_yes_or_no(machine: Machine) -> None:
    machine.python("python3.11")
    done = machine.install(GRPO_RAY_GPU="maybe")
    assert done.returncode == 1
    assert "GRPO_RAY_GPU=maybe: yes or no is meant" in done.stderr


def test_a_lock_has_a_marker_where_pythons_differ_and_both_files_give_each_package_one_version() -> None:
    found = merged({"3.11": {"a": "1", "b": "1"}, "3.12": {"a": "1", "b": "2"}, "3.13": {"a": "1", "b": "2", "c": "3"}})
    assert found == [
        "a==1",
        "b==1 ; python_version == '3.11'",
        "b==2 ; python_version == '3.12' or python_version == '3.13'",
        "c==3 ; python_version == '3.13'",
    ]
    assert pinned("a==1\nb==2+cpu\n") == {"a": "1", "b": "2+cpu"}
    from packaging.requirements import Requirement

    for lock in ("lock-cpu.txt", "lock-gpu.txt"):
        lines = [Requirement(line) for line in (ROOT / lock).read_text().splitlines()]
        for python in ("3.11", "3.12", "3.13"):
            here = {"python_version": python, "python_full_version": f"{python}.1"}
            names = [line.name for line in lines if line.marker is None or line.marker.evaluate(here)]
            assert len(names) == len(set(names)), python
            assert {"torch", "ray", "deepspeed", "transformers", "numpy"} <= set(names)
