"""The device kit: what it prunes, what it carries, and how large that is."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.gpu.kit import contents
from tests.gpu.kit.bare import canonical, packages
from tests.gpu.kit.fatprune import MAGIC, PTX, entries, prune
from tests.gpu.kit.pack import check_size, compress, copy_package, is_of_engine, lock_pins, repository_bytes

ROOT = Path(__file__).parents[2]
KIT = {**os.environ, "PYTHONPATH": str(ROOT), "KIT_MODELS": "unused", "OUT": "unused"}
CUBIN = 2


def piece(kind: int, architecture: int, code: bytes) -> bytes:
    """An entry of a fat binary, with a header of 64 bytes."""
    head = bytearray(struct.pack("<HHIQ", kind, 1, 64, len(code)) + bytes(48))
    struct.pack_into("<I", head, 0x1C, architecture)
    return bytes(head) + code


def fat_binary(*pieces: bytes) -> bytes:
    body = b"".join(pieces)
    return struct.pack("<IHHQ", MAGIC, 1, 16, len(body)) + body


def test_code_of_other_gpus_becomes_zeros_and_nothing_else_changes() -> None:
    kept, other, ptx = b"hopper-code.....", b"ampere-code.....", b"ptx-of-ampere..."
    first = fat_binary(piece(CUBIN, 80, other), piece(CUBIN, 90, kept), piece(PTX, 80, ptx))
    second = fat_binary(piece(CUBIN, 100, other))
    before = b"elf-header......" + first + bytes(8) + second + b"the rest"
    data = bytearray(before)
    section = (16, len(first) + 8 + len(second))
    assert prune(data, [section], frozenset((90,))) == 2 * len(other)
    assert bytes(data) == before.replace(other, bytes(len(other)))
    found = [(kind, architecture) for _, _, kind, architecture in entries(data, 16, sum(section))]
    assert found == [(CUBIN, 80), (CUBIN, 90), (PTX, 80), (CUBIN, 100)]


def test_everything_that_is_carried_is_pinned_in_the_lock_file() -> None:
    pins = lock_pins()
    assert pins["vllm"] == "0.32.0"
    assert {"ray", *contents.ENGINE, *contents.RUNS} <= pins.keys()
    assert not set(contents.ENGINE) & set(contents.RUNS), "carried once"


@pytest.mark.parametrize(
    ("name", "carried"),
    [
        ("vllm/v1/engine/core.py", True),
        ("vllm-0.32.0.dist-info/entry_points.txt", True),
        ("vllm/_C_stable_libtorch.abi3.so", True),
        ("vllm/_moe_C.abi3.so", False),
        ("vllm/model_executor/layers/fused_moe/configs/E=8.json", False),
    ],
)
def test_an_engines_files_are_carried_and_others_are_not(name: str, carried: bool) -> None:
    assert is_of_engine(name) == carried


def test_a_call_that_is_too_large_is_refused_and_the_repository_counts() -> None:
    repository = repository_bytes()
    assert 1 << 20 < repository < 8 << 20
    check_size("call-1", contents.CALL_BYTES - repository, repository)
    with pytest.raises(SystemExit, match="too large"):
        check_size("call-1", contents.CALL_BYTES - repository + 1, repository)


@pytest.mark.parametrize(("call", "names"), [(1, (*contents.ENGINE, *contents.COPIED)), (2, ("ray", *contents.RUNS))])
def test_whatever_a_carried_package_needs_is_there_or_carried(call: int, names: tuple[str, ...]) -> None:
    there = {"extra": "", "python_version": contents.PYTHON}
    needed = {
        (name, canonical(needs.name))
        for name in names
        for needs in map(Requirement, requires(name) or ())
        if needs.marker is None or needs.marker.evaluate(there)
    }
    assert {pair for pair in needed if pair[1] not in packages(call)} == set()


IMPORTS = {
    1: ["tests.gpu.kit.learner", "tests.gpu.kit.zero", "tests.gpu.kit.engine", "tests.gpu.kit.sampling"],
    2: [
        *("tests.bench.gpu", "tests.end_to_end.rewards", "launch.cli", "launch.run.jobs", "actors.control.controller"),
        *("actors.learner.group", "actors.reward.actor", "actors.rollout.actor", "actors.weights.sender"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_whatever_a_call_imports_is_there_or_carried(call: int) -> None:
    modules = [*IMPORTS[call], "actors.rollout.vllm_options", "vllm.v1.engine.async_llm", "deepspeed"]
    imports = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    command = f"from tests.gpu.kit.bare import hide; hide({call}); {imports}"
    done = subprocess.run(
        [sys.executable, "-c", command, *modules], cwd=ROOT, env=KIT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_gpu_tests_are_collected_with_what_is_there_or_carried() -> None:
    arguments = [
        "tests.gpu.kit.bare",
        "2",
        "pytest",
        "tests/gpu",
        "-m",
        "gpu",
        "--collect-only",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=KIT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert "test_colocated_gpu.py" in done.stdout


def test_a_package_that_is_neither_there_nor_carried_is_not_found() -> None:
    command = [sys.executable, "-m", "tests.gpu.kit.bare", "1", "plotly"]
    done = subprocess.run(command, cwd=ROOT, env=KIT, capture_output=True, text=True, timeout=120)
    assert "No module named plotly" in done.stderr


def test_a_folder_is_packed_the_same_each_time_without_bytecode(tmp_path: Path) -> None:
    (tmp_path / "site/pkg/__pycache__").mkdir(parents=True)
    (tmp_path / "site/pkg/a.py").write_text("x = 1\n")
    (tmp_path / "site/pkg/__pycache__/a.pyc").write_bytes(b"1")
    sizes = [compress(tmp_path / "site", tmp_path / f"{n}.tar.xz") for n in range(2)]
    assert (tmp_path / "0.tar.xz").read_bytes() == (tmp_path / "1.tar.xz").read_bytes()
    assert sizes[0] == (tmp_path / "0.tar.xz").stat().st_size
    names = subprocess.run(
        ["tar", "-tJf", str(tmp_path / "0.tar.xz")], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert names == ["./", "./pkg/", "./pkg/a.py"]


def test_a_compiled_package_is_not_copied_to_another_python(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is compiled here"):
        copy_package("blake3", tmp_path)
    copy_package("deepspeed", tmp_path)
    assert (tmp_path / "deepspeed/runtime/engine.py").is_file()


def test_the_checks_of_both_calls_fit_into_a_quarter_of_an_hour() -> None:
    script = (ROOT / "tests/gpu/kit/run.sh").read_text()
    limits = [int(line.split()[1]) for line in script.splitlines() if line.strip().startswith("check ")]
    assert len(limits) == 8
    assert sum(limits) <= 600, "starting the machine, transfers and unpacking take the rest of 900 s"
