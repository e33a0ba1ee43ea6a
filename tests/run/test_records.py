"""Nothing that a run has recorded is overwritten: what a restart takes back is kept, and one without its checkpoints is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.config.loading import to_yaml
from grpo_ray.errors import CheckpointError, ConfigError, DataError
from grpo_ray.run import records
from grpo_ray.run.ended import read_ended, write_ended
from grpo_ray.run.ledger import Ledger, last_trained
from grpo_ray.run.records import last_step, set_aside, step_to_resume
from grpo_ray.run.rollout_log import remove_after, rollout_path, rollout_steps
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.sample_files import About, SampleFolder
from grpo_ray.telemetry.timeline import Timeline
from grpo_ray.telemetry.trace_file import read_trace, step_of
from grpo_ray.telemetry.tracking import JsonlTracker, read_metrics
from grpo_ray.types import Group, Prompt, SampleInfo, Score, ScoreStatus, TimeSpan, Track
from tests.loop.test_train_loop import config

STEPS = 4


def group_of(prompt: str, order: int, version: int) -> Group:
    sample = SampleInfo(prompt, 0, 1, 1, version, "stop", "w-0", None, 0)
    return Group(Prompt(prompt, [], "", None, {}), order, version, [sample], [Score(ScoreStatus.OK, 1.0)])


def recorded(folder: Path, steps: int = STEPS, rows: int = 2) -> RunDir:
    """A run of so many steps, each of two groups, the second of which is dropped."""
    folder.mkdir(exist_ok=True)
    run = RunDir(folder)
    run.config.write_text(to_yaml(config()))
    tracker, ledger, timeline = JsonlTracker(run.metrics), Ledger(run.ledger), Timeline(run.trace)
    run.rollouts.mkdir()
    tracker.log(0, {"eval/accuracy": 0.5})
    for step in range(1, steps + 1):
        tracker.log(step, {"reward/mean": step / 7})
        groups = [group_of(f"p/0/{step}-{i}", rows * step + i, step - 1) for i in range(rows)]
        ledger.dispatched(groups)
        for group in groups:
            ledger.sampled(group)
        ledger.trained(groups[:1], step)
        ledger.dropped(groups[1], step, "no_signal")
        rollout_path(run.rollouts, step).write_bytes(f"rows of step {step}".encode())
        timeline.record(step, TimeSpan("step", step, step + 1), {"learner": [Track("learner-0", ())]})
    ledger.dispatched([group_of("p/0/next", rows * (steps + 1), steps)])
    tracker.close()
    ledger.close()
    return run


def saved(run: RunDir, *steps: int, **state: Any) -> None:
    """Checkpoints of these steps, with nothing in them but the loop's state."""
    for step in steps:
        place = run.store.begin(step)
        with place.filling("loop") as (folder, sums):
            (folder / "loop.json").write_text(json.dumps({"step": step, "dropped": [], **state}))
        run.store.commit(place, step, sums, keep=9)


def cut(run: RunDir, step: int | None) -> None:
    """What the restart does with the records in their place."""
    JsonlTracker(run.metrics, -1 if step is None else step).close()
    remove_after(run.rollouts, step or 0)
    ledger = Ledger(run.ledger)
    ledger.roll_back(step or 0, 2 * (step or 0) + 2)
    ledger.close()
    timeline = Timeline(run.trace)
    timeline.resume(step or 0)


def everything(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("step", "taken_back"), [(None, [1, 2, 3, 4]), (0, [1, 2, 3, 4]), (2, [3, 4])])
def test_what_a_restart_takes_back_is_kept_and_what_it_goes_on_from_stays(
    tmp_path: Path, step: int | None, taken_back: list[int]
) -> None:
    run = recorded(tmp_path / "run")
    if step is not None:
        saved(run, step)
    before = everything(run.path)
    kept = set_aside(run, step)
    assert kept == run.superseded / "1"
    assert {k: v for k, v in everything(run.path).items() if not k.startswith("superseded/")} == before
    cut(run, step)
    lines = read_metrics(kept / "metrics.jsonl")
    assert [line["step"] for line in lines] == ([0] if step is None else []) + taken_back
    assert (kept / "metrics.jsonl").read_bytes() in before["metrics.jsonl"]
    assert run.metrics.read_bytes() + (kept / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]
    assert list(rollout_steps(kept / "rollouts")) == taken_back
    assert rollout_path(kept / "rollouts", 4).read_bytes() == before["rollouts/step-000004.parquet"]
    rows = [json.loads(line) for line in (kept / "ledger.jsonl").read_text().splitlines()]
    assert [(r["step"], r["state"], r["drop_reason"]) for r in rows] == [
        (s, *what) for s in taken_back for what in (("trained", None), ("dropped", "no_signal"))
    ]
    events = json.loads((kept / "trace.json").read_text())
    assert [e["name"] for e in events if e["ph"] == "X"] == [f"step {s}" for s in taken_back]
    assert list(run.superseded.iterdir()) == [kept]


def test_a_restart_that_takes_nothing_back_leaves_no_folder(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    saved(run, STEPS)
    assert set_aside(run, STEPS) is None
    assert set_aside(RunDir(tmp_path / "new"), None) is None
    assert not run.superseded.exists()


def test_every_restart_has_a_folder_of_its_own(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    saved(run, 2)
    set_aside(run, 2)
    cut(run, 2)
    tracker = JsonlTracker(run.metrics, 2)
    tracker.log(3, {"reward/mean": -1.0})
    tracker.close()
    assert set_aside(run, 2) == run.superseded / "2"
    assert [line["reward/mean"] for line in read_metrics(run.superseded / "2" / "metrics.jsonl")] == [-1.0]
    assert len(read_metrics(run.superseded / "1" / "metrics.jsonl")) == 2


def test_groups_that_the_checkpoint_gives_back_are_not_taken_back(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", steps=3)
    saved(run, 2, dropped=[{"dispatch_order": 7}])
    kept = set_aside(run, 2)
    assert kept is not None
    rows = [json.loads(line) for line in (kept / "ledger.jsonl").read_text().splitlines()]
    assert [r["dispatch_order"] for r in rows] == [6]


@pytest.mark.parametrize("done", range(4))
def test_a_restart_that_is_killed_before_all_is_cut_keeps_everything_once(tmp_path: Path, done: int) -> None:
    run = recorded(tmp_path / "run")
    saved(run, 2)
    before = everything(run.path)
    set_aside(run, 2)
    (run.superseded / "2.new").mkdir()
    (run.superseded / "2.new" / "half").touch()
    if done > 0:
        JsonlTracker(run.metrics, 2).close()
    if done > 1:
        rollout_path(run.rollouts, 3).unlink()
    if done > 2:
        cut(run, 2)
    kept = everything(run.superseded / "1")
    assert set_aside(run, 2) is None
    assert everything(run.superseded) == {f"1/{name}": data for name, data in kept.items()}
    cut(run, 2)
    assert run.metrics.read_bytes() + kept["metrics.jsonl"] == before["metrics.jsonl"]


@pytest.mark.parametrize("what", ["write_whole", "_link", "_keep_events", "sync_tree"])
def test_a_full_disk_ends_the_restart_and_everything_is_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = recorded(tmp_path / "run")
    before = everything(run.path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, what, full)
    with pytest.raises(OSError, match="No space left"):
        set_aside(run, None)
    assert everything(run.path) == before


def test_files_are_copied_where_a_disk_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    run = recorded(tmp_path / "run")
    kept = set_aside(run, None)
    assert kept is not None
    assert rollout_path(kept / "rollouts", 3).read_bytes() == b"rows of step 3"


@pytest.mark.parametrize("left", ["metrics.jsonl", "rollouts", "ledger.sqlite", "all"])
@pytest.mark.parametrize("where", [None, "/nowhere/mounted", "file:///nowhere/bucket"])
def test_a_run_with_steps_and_without_checkpoints_is_not_resumed_and_not_touched(
    tmp_path: Path, left: str, where: str | None
) -> None:
    from launch.run.jobs import resume_run

    run = recorded(tmp_path / "run").with_checkpoints(where)
    run.config.write_text(
        to_yaml(config("reward.functions=[{name: r1_format}]", *([f"checkpoint.path={where}"] if where else [])))
    )
    for path in run.path.iterdir():
        if left not in ("all", path.name) and path.name != "config.yaml":
            path.rename(tmp_path / path.name)
    before = everything(run.path)
    with pytest.raises(CheckpointError) as e:
        resume_run(run.path)
    for part in (f"has recorded {STEPS} steps", run.store.url, "Mount", "grpo-ray train", "Nothing was changed"):
        assert part in str(e.value)
    assert everything(run.path) == before


def test_what_a_killed_run_left_of_its_ledger_is_not_touched_either(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", steps=0)
    ledger = Ledger(run.ledger)
    group = group_of("p/0/0", 0, 0)
    ledger.dispatched([group])
    ledger.sampled(group)
    ledger.trained([group], 1)
    killed = RunDir(Path(shutil.copytree(run.path, tmp_path / "killed")))
    ledger.close()
    before = everything(killed.path)
    assert any(name.endswith("-wal") for name in before)
    with pytest.raises(CheckpointError, match="has recorded 1 step,"):
        step_to_resume(killed, lambda text: None)
    after = everything(killed.path)
    assert {k: v for k, v in after.items() if not k.endswith("-shm")} == {
        k: v for k, v in before.items() if not k.endswith("-shm")
    }
    killed.ledger.write_bytes(b"")
    assert last_step(killed) == 0


def test_a_run_that_has_recorded_no_step_may_begin_again(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", steps=0)
    told: list[str] = []
    assert (last_step(run), step_to_resume(run, told.append), told) == (0, None, [])
    saved(run, 0)
    assert step_to_resume(run, told.append) == 0
    kept = set_aside(run, None)
    assert kept is not None
    assert [line["step"] for line in read_metrics(kept / "metrics.jsonl")] == [0], "what was measured before the first"


def test_samples_whose_description_is_gone_are_not_mixed_with_others(tmp_path: Path) -> None:
    about = About("m", "", "p", 1, 1, 1, 1, {}, [])
    folder = SampleFolder.open(tmp_path / "samples", about)
    (folder.path / "samples-000000.parquet").write_bytes(b"x")
    (tmp_path / "samples.json").unlink()
    with pytest.raises(DataError, match=r"samples\.json, which says how they were made, is gone"):
        SampleFolder.open(tmp_path / "samples", about)


def test_rollouts_alone_are_kept_too_and_so_are_the_names_of_the_workers(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    named = [event for event in read_trace(run.trace) if event["ph"] == "M"]
    saved(run, STEPS - 1)
    kept = set_aside(run, STEPS - 1)
    assert kept is not None
    events = list(read_trace(kept / "trace.json"))
    assert named
    assert [event for event in events if event["ph"] == "M"] == named
    assert {step_of(event) for event in events if event["ph"] != "M"} == {STEPS}
    for file in (run.metrics, run.ledger):
        file.unlink()
    shutil.rmtree(run.superseded)
    kept = set_aside(run, None)
    assert kept is not None
    assert sorted(p.name for p in (kept / "rollouts").iterdir()) == [
        rollout_path(run.rollouts, step).name for step in range(1, STEPS + 1)
    ]


def test_a_restart_from_a_step_without_checkpoint_tells_that_and_leaves_nothing(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"step-000002/loop/loop\.json can't be read"):
        set_aside(run, 2)
    assert not run.superseded.exists() or list(run.superseded.iterdir()) == []


def test_what_is_wrong_with_a_newer_checkpoint_is_told_when_a_run_goes_on(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    saved(run, 1, 2)
    (broken,) = [p for p in run.path.rglob("loop.json") if "2" in p.parent.parent.name]
    broken.write_text("{}")
    told: list[str] = []
    assert step_to_resume(run, told.append) == 1
    assert len(told) == 1


def test_a_ledger_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(CheckpointError, match=r"ledger\.sqlite is no ledger \(file is not a database\); put it back"):
        last_trained(path)


def test_a_run_is_made_with_the_folders_above_it(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "runs" / "of" / "mine")
    assert run.path.is_dir()
    with pytest.raises(ConfigError, match=r"run .*mine exists already; continue it"):
        RunDir.create(recorded(run.path).path)


@pytest.mark.parametrize(
    "change", [{"step": "3"}, {"total_steps": "9"}, {"step": True}, {"length": [1]}, {"length": "abc"}, {"more": 1}]
)
def test_an_end_that_cannot_be_read_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    write_ended(tmp_path, config(), "finished", "done", 3, 9)
    ended = read_ended(tmp_path)
    assert ended is not None
    assert (ended.status, ended.text, ended.step, ended.total_steps) == ("finished", "done", 3, 9)
    file = tmp_path / "ended.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert read_ended(tmp_path) is None
