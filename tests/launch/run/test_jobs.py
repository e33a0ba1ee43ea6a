"""What is said when a run has ended: only of what there is, and how to go on only where there is something to go on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError, WorkerError
from grpo_ray.run.ended import write_ended
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import EndEvent
from launch import interrupts
from launch.run.jobs import _finish, start_sft
from launch.run.left import left_of, remove_if_nothing_happened

CONFIG = build(SftConfig, {"model": {"path": "a/b"}, "data": {"train": {"path": "c/d"}}, "num_steps": 5}, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "run")
    run.config.write_text("num_steps: 5\n")
    (run.path / "logs").mkdir()
    return run


def checkpoint(run: RunDir, step: int, recorded: int) -> None:
    run.store.commit(run.store.begin(step), step, {}, keep=1)
    run.metrics.write_text("".join(f'{{"step": {n}, "loss/sft": 1.0}}\n' for n in range(1, recorded + 1)))


def test_a_run_that_failed_before_its_first_step_names_no_report(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerError, match="no such column"):
        _finish(run, EndEvent("failed", "no such column"))
    assert capsys.readouterr().out == ""
    assert not (run.path / "report.html").exists()


@pytest.mark.parametrize(("done", "goes_on"), [(5, False), (3, True)])
def test_how_to_go_on_is_said_where_steps_are_left(
    run: RunDir, capsys: pytest.CaptureFixture[str], done: int, goes_on: bool
) -> None:
    checkpoint(run, done, done)
    write_ended(run.path, CONFIG, "failed", "nothing was trained in any of the steps", done, 5)
    with pytest.raises(WorkerError, match="nothing was trained"):
        _finish(run, EndEvent("failed", "nothing was trained in any of the steps"))
    told = capsys.readouterr().out
    assert f"report   {run.path / 'report.html'}" in told
    assert ("resume" in told) == goes_on
    assert (run.path / "report.html").is_file()


def test_a_stopped_run_ends_with_the_code_of_its_signal(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(run, 3, 3)
    for reason, code in (("SIGINT", 130), ("SIGTERM", 143), ("stopped", 143)):
        with pytest.raises(SystemExit) as e:
            _finish(run, EndEvent(reason, ""))
        assert e.value.code == code
        assert f"resume {run.path}" in capsys.readouterr().out


def test_the_line_on_what_is_left_is_true_of_the_folder(run: RunDir) -> None:
    command = "grpo-ray train r.yaml"
    checkpoint(run, 3, 5)
    assert left_of(run, command) == (
        f"`grpo-ray resume {run.path}` goes on after step 3, its newest checkpoint, and does steps 4 to 5 again"
    )
    run.metrics.write_text("")
    assert left_of(run, command) == f"`grpo-ray resume {run.path}` goes on after step 3"


def test_of_a_run_without_a_step_its_logs_are_left_and_its_name_is_free(run: RunDir) -> None:
    command = "grpo-ray train r.yaml"
    assert "no checkpoint yet" in left_of(run, command)
    remove_if_nothing_happened(run)
    assert [p.name for p in run.path.iterdir()] == ["logs"]
    assert left_of(run, command) == (
        f"nothing was trained, and of the run only {run.path}/logs is left; `{command}` begins again"
    )
    (run.path / "logs").rmdir()
    remove_if_nothing_happened(run)
    assert not run.path.exists()
    assert left_of(run, command) == f"nothing was trained, and nothing is left of the run; `{command}` begins again"


def test_a_signal_during_the_checks_takes_nothing_of_a_folder_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(config: SftConfig) -> None:
        for entry in reversed(interrupts._open):
            if entry.end is not None:
                entry.end()
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.run.jobs.preflight", signalled)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{num_steps: 1, model: {path: a/b}, data: {train: {path: c/d}}}")
    for name in ("samples", "new"):
        if name == "samples":
            (tmp_path / name / "samples").mkdir(parents=True)
            (tmp_path / name / "samples" / "0.parquet").write_bytes(b"mine")
        with pytest.raises((KeyboardInterrupt, ConfigError)):
            start_sft(str(recipe), [f"dir={tmp_path}", f"name={name}"])
    assert (tmp_path / "samples" / "samples" / "0.parquet").read_bytes() == b"mine"
    assert not (tmp_path / "new").exists()
