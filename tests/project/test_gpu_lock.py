"""lock-gpu.txt, and the check of its fresh installs (`tests/gpu/installs.py`), offline."""

from __future__ import annotations

import zipfile
from base64 import urlsafe_b64encode
from hashlib import sha256
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.gpu.installs import import_error, install, put_driver, shared_files
from tests.project.test_install import ROOT, install_from


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_gpu_lock_has_no_cuda_python_with_files_of_cuda_bindings(python: str) -> None:
    """Before 13, cuda-python is no wrapper of cuda-bindings but has 28 of the same files, of CUDA 12."""
    lines = [Requirement(line) for line in (ROOT / "lock-gpu.txt").read_text().splitlines()]
    here = {"python_version": python, "python_full_version": f"{python}.1"}
    found = {
        line.name: Version(str(line.specifier).removeprefix("=="))
        for line in lines
        if line.marker is None or line.marker.evaluate(here)
    }
    assert found["cuda-python"].major == found["cuda-bindings"].major == 13
    assert {"vllm", "flashinfer-python", "cuda-core"} <= set(found)


def put_package(folder: Path, name: str, text: str) -> None:
    known = f"{name}-1.dist-info"
    contents = {
        "common/inner.py": text,
        "common/same.py": "",
        "build_backend.py": text,
        f"{known}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
        f"{known}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as file:
        for path, content in contents.items():
            file.writestr(path, content)
        sums = {
            path: urlsafe_b64encode(sha256(c.encode()).digest()).decode().rstrip("=") for path, c in contents.items()
        }
        file.writestr(f"{known}/RECORD", "".join(f"{path},sha256={sum_},\n" for path, sum_ in sums.items()))


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of two packages that own the same files, as cuda-python 12 and cuda-bindings 13 do."""
    (wheels := tmp_path / "wheels").mkdir()
    put_package(wheels, "one", "x = 1\n")
    put_package(wheels, "two", "raise AttributeError('no attribute cudaLibrary_t')\n")
    install_from(wheels, monkeypatch)
    (lock := tmp_path / "lock.txt").write_text("one==1\ntwo==1\n")
    return lock


def test_an_install_with_a_file_of_two_packages_is_noticed(lock: Path, tmp_path: Path) -> None:
    python = install(tmp_path / "env", lock, tmp_path / "cache")
    (site,) = (tmp_path / "env" / "lib").glob("python3*/site-packages")
    assert shared_files(site) == {"common/inner.py": ["one", "two"]}
    (site / "common" / "inner.py").write_text("raise AttributeError('no attribute cudaLibrary_t')\n")
    driver = put_driver(tmp_path / "driver")
    told = import_error(python, ("common.same", "common.inner"), driver, tmp_path / "bytecode")
    assert told == "AttributeError: no attribute cudaLibrary_t"
    assert import_error(python, ("common.same",), driver, tmp_path / "bytecode") == ""
    load = "import ctypes; assert ctypes.CDLL('libcuda.so.1').cuInit(0) == 100"
    (site / "loads.py").write_text(load)
    assert import_error(python, ("loads",), driver, tmp_path / "bytecode") == ""
