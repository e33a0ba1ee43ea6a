"""How the program is called here, what it runs on, and how quickly it says so."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from launch import program
from launch.run import smoke

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with a `.venv/bin` that has the program, as the current folder."""
    script = tmp_path / ".venv" / "bin" / "grpo-ray"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(script.with_name("python")))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return script


def test_messages_name_the_program_as_this_shell_finds_it(
    installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "`grpo-ray resume runs/a` goes on; this grpo-ray is fine; see grpo-ray --help"
    assert program.runnable(text) == (
        "`.venv/bin/grpo-ray resume runs/a` goes on; this grpo-ray is fine; see .venv/bin/grpo-ray --help"
    )
    monkeypatch.chdir("/usr")
    assert program.program() == str(installed)
    monkeypatch.setenv("PATH", f"{installed.parent}:/usr/bin")
    assert program.runnable(text) == text
    # Another one that comes first is not this one.
    other = tmp_path / "other" / "grpo-ray"
    other.parent.mkdir()
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{installed.parent}")
    assert program.program() == str(installed)


def test_every_command_is_known_by_its_name() -> None:
    from launch.cli import app

    names = {c.name or c.callback.__name__.replace("_", "-") for c in app.registered_commands}  # type: ignore[union-attr]
    assert names == set(program.COMMANDS)


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["status"]])
def test_what_needs_no_machinery_imports_none(args: list[str]) -> None:
    script = """
import sys
from launch.cli import main
try:
    main()
finally:
    print(sorted({"ray", "torch", "transformers", "vllm", "deepspeed", "datasets"} & set(sys.modules)), file=sys.stderr)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script, *args], env=env, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "[]"
    if args == ["--version"]:
        told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
        assert list(told) == ["grpo-ray", "python", "torch", "vllm", "ray", "deepspeed", "transformers"]
        assert told["torch"] == version("torch")
        assert told["python"] == sys.version.split()[0]


def test_the_cold_start_of_a_smoke_run_is_where_the_recipe_looks_for_it(tmp_path: Path) -> None:
    for stamp in ("1", "2"):
        (tmp_path / f"smoke-{stamp}-sft" / "hf").mkdir(parents=True)
        smoke.link_cold_start(tmp_path / f"smoke-{stamp}-sft", smoke.COLD_START)
        assert (tmp_path / "smoke-sft" / "hf").resolve() == tmp_path / f"smoke-{stamp}-sft" / "hf"
    (tmp_path / "smoke-sft").unlink()
    (tmp_path / "smoke-sft").mkdir()
    smoke.link_cold_start(tmp_path / "smoke-1-sft", smoke.COLD_START)
    assert not (tmp_path / "smoke-sft").is_symlink()
