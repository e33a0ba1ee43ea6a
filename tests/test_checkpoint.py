"""Checkpoints are whole or not there."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from grpo_ray.checkpoint import RunDir, save_checkpoint
from grpo_ray.errors import CheckpointError, ConfigError


def save(run: RunDir, step: int, *, keep: int = 2, fail: BaseException | None = None, export: bool = True) -> Path:
    async def write(folder: Path) -> None:
        (folder / "learner").mkdir()
        (folder / "learner" / "weights").write_bytes(b"x" * 100)
        if fail is not None:
            raise fail
        if export:
            (folder / "hf").mkdir()
            (folder / "hf" / "config.json").write_text(str(step))

    return asyncio.run(save_checkpoint(run, step, {"step": step}, write, keep=keep))


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir.create(tmp_path / "run")


def test_the_newest_checkpoints_are_kept_and_the_exported_model_follows_them(run):
    for step in (1, 2, 3):
        save(run, step)
    assert run.steps() == [2, 3]
    assert run.load_state(3) == {"step": 3}
    assert (run.exported / "config.json").read_text() == "3"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("rank 1 died")])
def test_a_save_that_fails_leaves_the_one_before_it_and_no_trace(run, error):
    save(run, 1)
    with pytest.raises((CheckpointError, RuntimeError)) as e:
        save(run, 2, fail=error)
    if isinstance(error, OSError):
        assert "No space left" in str(e.value)
        assert "GB free" in str(e.value)
    assert run.steps() == [1]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-000001"]


def test_a_folder_without_its_last_file_is_no_checkpoint(run):
    path = save(run, 1)
    (path / "loop.json").unlink()
    assert run.steps() == []


def test_a_broken_state_file_is_named(run):
    path = save(run, 1)
    (path / "loop.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"loop\.json"):
        run.load_state(1)


def test_a_run_is_never_overwritten_but_logs_of_a_failed_start_are_no_run(tmp_path):
    path = tmp_path / "r"
    (path / "logs").mkdir(parents=True)
    RunDir.create(path)
    (path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="grpo-ray resume"):
        RunDir.create(path)
