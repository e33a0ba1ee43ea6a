"""`make gpu-kit`: packs .kit/call-1.tar.xz and .kit/call-2.tar.xz. Downloads 500 MB, and takes ten minutes of a core.

python -m tests.gpu.kit.pack [WHEELS]      WHEELS: a folder for wheels, kept between calls (.kit/wheels)
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.gpu.kit.contents import (
    ARCHITECTURES,
    CALL_BYTES,
    COPIED,
    ENGINE,
    ENTRY_POINTS,
    PYTHON,
    RAY_LEFT_OUT,
    RUNS,
    VLLM_LIBRARIES,
)
from tests.gpu.kit.fatprune import prune_library

ROOT = Path(__file__).parents[3]
KIT = ROOT / ".kit"
_GLIBC = (17, 24, 27, 28, 31, 34, 35)
DOWNLOAD_S = 1800


def main() -> None:
    wheels = Path(sys.argv[1]) if len(sys.argv) > 1 else KIT / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    KIT.mkdir(exist_ok=True)
    repository = repository_bytes()
    calls: tuple[tuple[str, Callable[[Path, Path], None]], ...] = (("call-1", lay_out_engine), ("call-2", lay_out_runs))
    for name, lay_out in calls:
        with tempfile.TemporaryDirectory() as folder:
            site = Path(folder) / "site"
            site.mkdir()
            lay_out(wheels, site)
            packed = compress(site, KIT / f"{name}.tar.xz")
        check_size(name, packed, repository)


def check_size(name: str, packed: int, repository: int) -> None:
    """Print the size of a call; raises SystemExit for one that is too large."""
    total = packed + repository
    told = f"{name}: {packed / 2**20:.1f} MiB, with the repository {total / 2**20:.1f} of {CALL_BYTES >> 20}"
    if total > CALL_BYTES:
        raise SystemExit(f"{told}: too large; take packages out of tests/gpu/kit/contents.py")
    print(told)


def lay_out_engine(wheels: Path, site: Path) -> None:
    """Unpack what call 1 carries."""
    pins = lock_pins()
    unpack(download([f"{name}=={pins[name]}" for name in ENGINE], wheels), site)
    (vllm,) = download([f"vllm=={pins['vllm']}"], wheels)
    with zipfile.ZipFile(vllm) as archive:
        archive.extractall(site, [name for name in archive.namelist() if is_of_engine(name)])
    missing = [name for name in VLLM_LIBRARIES if not list(site.glob(f"vllm/**/{name}"))]
    if missing:
        raise SystemExit(f"{vllm.name} has no {', '.join(missing)}: see VLLM_LIBRARIES")
    for library in site.glob("vllm/**/*.so"):
        prune_library(library, ARCHITECTURES)
    for package in COPIED:
        copy_package(package, site)


def lay_out_runs(wheels: Path, site: Path) -> None:
    """Unpack what call 2 carries."""
    pins = lock_pins()
    unpack(download([f"{name}=={pins[name]}" for name in ("ray", *RUNS)], wheels), site)
    for folder in RAY_LEFT_OUT:
        shutil.rmtree(site / "ray" / folder, ignore_errors=True)
    for program in [
        *site.glob("ray/**/*.so"),
        site / "ray/core/src/ray/raylet/raylet",
        site / "ray/core/src/ray/gcs/gcs_server",
    ]:
        subprocess.run(["strip", "--strip-unneeded", str(program)], check=True, timeout=300)
    for folder, text in ENTRY_POINTS.items():
        (site / folder).mkdir()
        name, version = folder.removesuffix(".dist-info").split("-")
        (site / folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (site / folder / "entry_points.txt").write_text(text)


def is_of_engine(name: str) -> bool:
    """Whether an engine reads this file of vLLM's wheel: its Python, its metadata, and some of its libraries."""
    if name.endswith(".so"):
        return Path(name).name in VLLM_LIBRARIES
    return name.endswith(".py") or ".dist-info/" in name


def lock_pins() -> dict[str, str]:
    """Package -> version, of the lock file for GPUs."""
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", (ROOT / "lock-gpu.txt").read_text(), re.MULTILINE)
    return {name: version.partition("+")[0] for name, version in found}


def download(requirements: Iterable[str], wheels: Path) -> list[Path]:
    """The wheels of these packages for that machine's Python, each downloaded once."""
    found = []
    for requirement in requirements:
        name, _, version = requirement.partition("==")
        pattern = f"{re.sub('[-_.]+', '_', name)}-{version}-*.whl"
        if not list(wheels.glob(pattern)):
            platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in _GLIBC]
            platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
            abis = ["--abi=cp312", "--abi=abi3", "--abi=none"]
            python = [f"--python-version={PYTHON}", "--implementation=cp"]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            command += [*platforms, *abis, *python, "-d", str(wheels), requirement]
            subprocess.run(command, check=True, timeout=DOWNLOAD_S)
        found += list(wheels.glob(pattern))[:1]
    return found


def unpack(wheels: Iterable[Path], site: Path) -> None:
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        for scripts in site.glob("*.data"):
            shutil.rmtree(scripts)


def copy_package(package: str, site: Path) -> None:
    """Copy a package of this environment. Raises SystemExit if it is more than Python."""
    files = [
        file
        for file in importlib.metadata.files(package) or ()
        if ".." not in file.parts and "__pycache__" not in file.parts
    ]
    if any(file.suffix == ".so" for file in files):
        raise SystemExit(f"{package} is compiled here: it can't be copied to another Python")
    for file in files:
        target = site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.locate(), target)


def compress(site: Path, archive: Path) -> int:
    """Pack a folder; returns the bytes of the archive."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        plain = Path(folder) / "site.tar"
        with tarfile.open(plain, "w") as tar:
            tar.add(site, arcname=".", filter=_plain)
        with archive.open("wb") as out:
            subprocess.run(
                ["nice", "-n", "15", "xz", "-6", "--stdout", str(plain)], stdout=out, check=True, timeout=DOWNLOAD_S
            )
    return archive.stat().st_size


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """An entry without its owner and time, or nothing for what Python makes again."""
    if "__pycache__" in info.name:
        return None
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def repository_bytes() -> int:
    """The bytes of the files of this repository, which each call carries too."""
    told = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return sum((ROOT / name).stat().st_size for name in told.stdout.split("\0") if name)


if __name__ == "__main__":
    main()
