"""Fresh installs of lock-gpu.txt, one after the other, without a GPU: `make gpu-installs`, or `python -m tests.gpu.installs`.

uv unpacks packages in parallel. Where two of them own a file, either may win, and an environment may work in one install
and not in the next. After each install: no file has two owners of different contents, and what every engine imports on a
GPU can be imported. The driver's library, which a machine without a GPU does not have, is replaced by an empty one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "lock-gpu.txt"
IMPORTS = ("flashinfer", "vllm.v1.attention.backends.flashinfer", "vllm.v1.worker.gpu.sample.sampler", "cuda.core")
STRAY = {"build_backend.py"}
"""Files that packages leave beside their code by mistake, and that nothing imports."""
INSTALL_S = 3600.0
IMPORT_S = 1200.0


def shared_files(site: Path) -> dict[str, list[str]]:
    """File -> the packages that own it with different contents, in this folder of packages."""
    owners: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for package in metadata.distributions(path=[str(site)]):
        name = package.metadata["Name"]
        for file in package.files or ():
            if file.hash is not None and str(file) not in STRAY:
                owners[str(file)][name] = file.hash.value
    return {file: sorted(whose) for file, whose in owners.items() if len(set(whose.values())) > 1}


def put_driver(folder: Path) -> Path:
    """Put a library of the driver's name, with nothing in it, into a folder."""
    folder.mkdir()
    source = folder / "empty.c"
    source.write_text("int cuInit(unsigned int flags) { (void)flags; return 100; }\n")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return folder


def install(folder: Path, lock: Path, cache: Path | None) -> Path:
    """A new environment with the packages of the lock; returns its Python."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert uv is not None, "uv is neither beside this Python nor on the path: pip install uv"
    env = os.environ | ({"UV_CACHE_DIR": str(cache)} if cache else {})
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    for command in (
        [uv, "venv", "-q", "--python", sys.executable, str(folder)],
        [uv, "pip", "install", "-q", "--python", str(python), "--no-deps", "--link-mode", "hardlink", "-r", str(lock)],
    ):
        subprocess.run(command, env=env, check=True, timeout=INSTALL_S)
    return python


def import_error(python: Path, modules: tuple[str, ...], driver: Path, bytecode: Path) -> str:
    """The last line of the error of importing modules one after the other; '' if they can be."""
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "LD_LIBRARY_PATH": str(driver),
        "PYTHONPYCACHEPREFIX": str(bytecode),
    }
    env = {k: v for k, v in env.items() if k != "PYTHONPATH"}
    command = [str(python), "-W", "ignore", "-c", "".join(f"import {m}\n" for m in modules)]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=IMPORT_S, check=False, cwd=driver.parent
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10)
    parser.add_argument("--lock", type=Path, default=LOCK)
    parser.add_argument("--cache", type=Path, help="uv's cache; on the disk of --folder installs are hardlinks")
    parser.add_argument("--folder", type=Path, help="where environments are made and removed (10 GB)")
    args = parser.parse_args()
    failures = 0
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        driver = put_driver(folder / "driver")
        for number in range(1, args.number + 1):
            started = time.monotonic()
            python = install(folder / "env", args.lock, args.cache)
            installed_s = time.monotonic() - started
            (site,) = (folder / "env" / "lib").glob("python3*/site-packages")
            shared, error = shared_files(site), import_error(python, IMPORTS, driver, folder / "bytecode")
            failures += bool(shared or error)
            told = error or "all imported"
            print(f"{number}: {installed_s:.0f} s, {len(shared)} files of two packages, {told}", flush=True)
            for file, whose in sorted(shared.items())[:3]:
                print(f"   {file}: {', '.join(whose)}", flush=True)
    print(f"{args.number - failures} of {args.number} installs of {args.lock.name} are sound")
    sys.exit(int(failures > 0))


if __name__ == "__main__":
    main()
