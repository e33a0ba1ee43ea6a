"""Which Python the set-up takes, and what it does where there is none: the script itself, with interpreters of straw."""

from __future__ import annotations

import platform
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from launch.lock import UnresolvedError, merged, pinned, resolve, resolve_all

ROOT = Path(__file__).parents[2]
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


NVIDIA_SMI = """#!/bin/bash
case "$1" in -L) echo "GPU 0: NVIDIA H100 80GB HBM3";; --query-gpu=driver_version) {answer};; esac
"""


def put_gpu(machine: Machine, answer: str, free_gb: int = 100) -> None:
    machine.python("python3.11")
    machine.put("nvidia-smi", NVIDIA_SMI.format(answer=answer))
    (machine.bin / "df").unlink()
    machine.put("df", f"#!/bin/bash\necho; echo / 0 0 {free_gb * 1048576}\n")


@pytest.mark.parametrize("version", ["535.104.05", "570.86.15", "9.1"])
def test_a_driver_too_old_for_cuda_13_is_refused_before_anything_is_downloaded(machine: Machine, version: str) -> None:
    put_gpu(machine, f"echo {version}; echo {version}")
    done = machine.install(GRPO_RAY_GPU="")
    assert done.returncode == 1
    assert f"the NVIDIA driver here is {version}, and torch for CUDA 13 needs 580 or newer" in done.stderr
    assert "GRPO_RAY_GPU=no" in done.stderr
    assert not machine.is_set_up
    assert machine.install(GRPO_RAY_GPU="no").returncode == 0


@pytest.mark.parametrize("answer", ["echo 580.65.06", "echo 1000.1", "exit 9", "echo '[N/A]'"])
def test_a_new_driver_is_taken_and_one_that_is_not_told_is_no_obstacle(machine: Machine, answer: str) -> None:
    put_gpu(machine, answer)
    done = machine.install(GRPO_RAY_GPU="")
    assert done.returncode == 0, done.stderr
    assert "packages of lock-gpu.txt" in done.stdout


def test_the_gpu_packages_want_more_room(machine: Machine) -> None:
    put_gpu(machine, "echo 580.65.06", free_gb=12)
    done = machine.install(GRPO_RAY_GPU="")
    assert "12 GB free on this disk, 16 GB are needed" in done.stderr
    assert machine.install(GRPO_RAY_GPU="no").returncode == 0


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
    for python, of_one in {"3.11": {"b": "1"}, "3.12": {"b": "2"}, "3.13": {"b": "2", "c": "3"}}.items():
        assert pinned("\n".join(found), python) == {"a": "1", **of_one}
    from packaging.requirements import Requirement

    for lock in ("lock-cpu.txt", "lock-gpu.txt"):
        lines = [Requirement(line) for line in (ROOT / lock).read_text().splitlines()]
        for python in ("3.11", "3.12", "3.13"):
            here = {"python_version": python, "python_full_version": f"{python}.1"}
            names = [line.name for line in lines if line.marker is None or line.marker.evaluate(here)]
            assert len(names) == len(set(names)), python
            assert {"torch", "ray", "deepspeed", "transformers", "numpy"} <= set(names)


def install_from(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let uv find packages in this folder alone."""
    for name, value in {
        "UV_NO_INDEX": "1",
        "UV_OFFLINE": "1",
        "UV_NO_CONFIG": "1",
        "UV_FIND_LINKS": str(wheels),
    }.items():
        monkeypatch.setenv(name, value)


def put_wheel(folder: Path, name: str, version: str, tag: str, requires: str = "") -> None:
    known = f"{name}-{version}.dist-info"
    of = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {requires}\n" if requires else ""
    )
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as file:
        file.writestr(f"{known}/METADATA", of)
        file.writestr(f"{known}/WHEEL", f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: false\nTag: {tag}\n")
        file.writestr(f"{known}/RECORD", "")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its lock file: `tensors` has a wheel for Python 3.11 alone and requires `pure`; uv knows of no other packages."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    put_wheel(
        wheels,
        "tensors",
        "2+cpu",
        f"cp311-cp311-manylinux_2_17_{platform.machine()}",
        "pure>=3; python_version >= '3.12'",
    )
    for version in ("2", "3"):
        put_wheel(wheels, "pure", version, "py3-none-any")
    (tmp_path / "pyproject.toml").write_text(
        "[project]\nname = 'p'\nversion = '1'\nrequires-python = '>=3.11'\ndependencies = ['tensors==2']\n"
        "[project.optional-dependencies]\ncpu = []\ndev = ['pure']\n"
    )
    install_from(wheels, monkeypatch)
    lock = tmp_path / "lock-cpu.txt"
    lock.write_text("pure==2\ntensors==1\n")
    return lock


def install(folder: Path, requires: str) -> None:
    known = folder / "site" / "tensors-2+cpu.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tensors\nVersion: 2+cpu\nRequires-Dist: {requires}\n"
    )


def test_a_package_without_a_wheel_for_one_python_does_not_lose_the_lock_of_that_python(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, "pure>=3; python_version >= '3.12'")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert resolve("cpu", "3.11", project) == {"pure": "2", "tensors": "2+cpu"}
    assert capsys.readouterr().out == ""
    assert resolve("cpu", "3.12", project) == {"pure": "3", "tensors": "2+cpu"}
    assert "no wheel of tensors 2+cpu for Python 3.12 is at hand" in capsys.readouterr().out


def test_what_can_not_be_resolved_for_one_python_stays_and_is_said_and_the_others_are_resolved(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnresolvedError, match="no wheels with a matching Python ABI tag"):
        resolve("cpu", "3.12", project)
    assert resolve_all("cpu", project) == ["3.12", "3.13"]
    assert project.read_text().splitlines() == [
        "pure==2",
        "tensors==2+cpu ; python_version == '3.11'",
        "tensors==1 ; python_version == '3.12' or python_version == '3.13'",
    ]
    told = capsys.readouterr()
    assert "lock-cpu.txt: not resolved for Python 3.13, whose lines stay as they are. uv says:" in told.err
    assert "tensors==2+cpu has no wheels" in " ".join(told.err.split())
    assert told.out.endswith("lock-cpu.txt: 3 lines; not resolved anew: Python 3.12, 3.13\n")
