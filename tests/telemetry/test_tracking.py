"""metrics.jsonl, other trackers, and rollouts as Parquet: what is written, and what is left after a resume."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_ray.config.common import TrackingConfig
from grpo_ray.errors import ConfigError
from grpo_ray.run.rollout_log import (
    ParquetRolloutLog,
    distinct_refs,
    read_rollouts,
    remove_after,
    rollout_steps,
    write_rollouts,
)
from grpo_ray.seeds import sample_seed
from grpo_ray.telemetry.tracking import (
    BestEffortTracker,
    JsonlTracker,
    MlflowTracker,
    WandbTracker,
    make_trackers,
    read_metrics,
)
from grpo_ray.types import Group, Prompt, RewardScore, Sample, SampleInfo, Score, ScoreStatus, Step, VersionSpan
from tests.batches import batch_of


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_line_a_step_and_an_evaluation_joins_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(0, {"eval/accuracy": 0.25})
    tracker.log(1, {"reward/mean": 0.123456789012345, "time/step": 1.0})
    tracker.log(1, {"eval/accuracy": 0.5, "reward/mean": 0.5})
    tracker.log(2, {"reward/mean": 0.75})
    tracker.close()
    lines = lines_of(path)
    assert [line.pop("time") > 0 for line in lines] == [True] * 3
    assert lines == [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "reward/mean": 0.5, "time/step": 1.0, "eval/accuracy": 0.5},
        {"step": 2, "reward/mean": 0.75},
    ]


def test_what_is_not_a_number_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(path).log(1, {"a": math.nan, "b": math.inf, "c": np.float32(0.5)})  # type: ignore[dict-item]
    (line,) = path.read_text().splitlines()
    assert "NaN" not in line
    assert "Infinity" not in line
    record = json.loads(line)
    assert (record["a"], record["b"], record["c"]) == (None, None, 0.5)


def test_resume_keeps_exactly_the_lines_up_to_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    for step in range(1, 8):
        tracker.log(step, {"x": step / 3})
    tracker.close()
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + b'{"step": 8, "ti')  # killed while writing
    JsonlTracker(path, resume_step=4).log(5, {"x": -1.0})
    after = path.read_bytes().splitlines(keepends=True)
    assert after[:4] == before[:4]
    assert [(r["step"], r["x"]) for r in read_metrics(path)[4:]] == [(5, -1.0)]
    assert len(after) == 5
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_cut_just_before_its_end_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x": 2.0}')
    JsonlTracker(path).log(2, {"x": 2.5})
    assert [(r["step"], r["x"]) for r in lines_of(path)] == [(1, 1.0), (2, 2.5)]


def test_a_line_that_becomes_shorter_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log(1, {"x": 0.123456789012345})
    tracker.log(1, {"x": 1.0})
    assert [(r["step"], r["x"]) for r in lines_of(path)] == [(1, 1.0)]
    tracker.log(2, {"x": 2.0})
    tracker.close()
    assert [(r["step"], r["x"]) for r in lines_of(path)] == [(1, 1.0), (2, 2.0)]


def test_a_torn_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "x": 1.0}\n{"step": 2, "x"')
    JsonlTracker(path).log(2, {"x": 2.0})
    assert [(r["step"], r["x"]) for r in read_metrics(path)] == [(1, 1.0), (2, 2.0)]


def test_reading_joins_the_lines_of_a_step_and_passes_over_torn_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "x": 2}\n{"step": 1, "x": 1}\nnull\n{"step": 2, "y": 3}\n{"step": 3')
    assert read_metrics(path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2, "y": 3}]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


@pytest.mark.timeout(300)
def test_tensorboard_shows_a_resumed_run_without_the_forgotten_steps(tmp_path: Path) -> None:
    for resume, steps in ((None, range(1, 6)), (3, range(4, 6))):
        trackers = make_trackers(TrackingConfig(tensorboard=True), tmp_path, resume, {})
        for step in steps:
            for tracker in trackers:
                tracker.log(step, {"reward/mean": step + (0.5 if resume else 0.0)})
        for tracker in trackers:
            tracker.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5)]
    assert scalars(tmp_path / "tensorboard", "reward/mean") == expected
    assert [(r["step"], r["reward/mean"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == expected


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_mend(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = TrackingConfig(tensorboard=False, wandb=name == "wandb", mlflow=name == "mlflow")
    with pytest.raises(ConfigError, match=rf"tracking\.{name}.*pip install grpo-ray\[{name}\]"):
        make_trackers(config, tmp_path, None, {})


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")

    def close(self) -> None:
        self.calls += 1
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken()
    tracker = BestEffortTracker("W&B", lambda: broken)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log(step, {"x": 1.0})
        tracker.close()
    assert broken.calls == 4
    assert [r.getMessage() for r in caplog.records] == [
        "tracking to W&B failed, the run goes on: ConnectionError: no route to host"
    ]


def test_a_tracker_that_can_not_start_is_told_once_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def start() -> Broken:
        raise PermissionError("log in first")

    tracker = BestEffortTracker("W&B", start)
    tracker.log(1, {"x": 1.0})
    tracker.close()
    assert len(caplog.records) == 1


@pytest.mark.timeout(300)
def test_wandb_gets_every_step_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = WandbTracker("tests", tmp_path, {"seed": 1})
    for step in range(1, 4):
        tracker.log(step, {"reward/mean": step / 4})
    tracker.close()
    assert len((tmp_path / "wandb-run-id").read_text()) == 12
    assert [p.stat().st_size > 0 for p in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == [True]


def test_a_resumed_run_goes_on_in_its_own_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the package makes of it: what it is asked for."""
    asked: list[dict[str, Any]] = []

    class Run:
        def define_metric(self, _name: str, **_: Any) -> None: ...

        def finish(self) -> None: ...

    def init(**options: Any) -> Run:
        asked.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for name in ("one", "one", "other"):
        (tmp_path / name).mkdir(exist_ok=True)
        WandbTracker("tests", tmp_path / name, {"seed": 1}).close()
    first, resumed, other = (options["id"] for options in asked)
    assert first == resumed != other
    assert {options["resume"] for options in asked} == {"allow"}
    assert [options["name"] for options in asked] == ["one", "one", "other"]


@pytest.mark.timeout(300)
def test_mlflow_gets_every_step_and_a_resumed_run_goes_on_in_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for steps in (range(1, 3), range(3, 5)):
        tracker = MlflowTracker("tests", run_dir, {"learner": {"learning_rate": 1e-4}, "long": "x" * 9000})
        for step in steps:
            tracker.log(step, {"reward/mean": step / 4, "kl/ref": math.nan})
        tracker.close()
    client = mlflow.tracking.MlflowClient()
    run_id = (run_dir / "mlflow-run-id").read_text()
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "reward/mean")] == [
        (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)
    ]  # fmt: skip
    assert client.get_run(run_id).data.params["learner.learning_rate"] == "0.0001"


# Rollouts.


def two_groups() -> list[Group]:
    """Two groups of two; the samples of a list belong to different groups, as they do behind a Ray reference."""
    rng = np.random.default_rng(0)
    groups = [
        Group(Prompt(f"set/0/{i}", [7, 8, i], f"what is {i}?", None, {}), order=i, dispatched_version=2) for i in (0, 1)
    ]
    for index in (0, 1):
        ref: list[Sample] = []
        for row, g in enumerate(groups):
            size = 3 + 4 * row + index
            ref.append(
                Sample(
                    prompt_id=g.prompt.id,
                    index=index,
                    prompt_token_ids=np.array(g.prompt.token_ids, dtype=np.int32),
                    token_ids=rng.integers(0, 1000, size, dtype=np.int32),
                    logprobs=-rng.random(size, dtype=np.float32),
                    versions=(VersionSpan(1, 0, 2), VersionSpan(2, 2, size)),
                    finish_reason="stop" if index else "length",
                    text=f"<script>{row}\ud800\u2028é",
                )
            )
            g.samples.append(SampleInfo(g.prompt.id, index, 3, size, 1, "stop", f"rollout-{index}", ref, row))
            good = RewardScore("accuracy", ScoreStatus.OK, 1.0, seconds=0.5, steps=(Step(0, 0.25), Step(2, 0.75)))
            bad = RewardScore("style", ScoreStatus.TIMEOUT, math.nan, "10 s are over", 10.0)
            g.scores.append(
                Score(ScoreStatus.OK, 1.0, (good,)) if row else Score(ScoreStatus.TIMEOUT, math.nan, (good, bad))
            )
            g.advantages.append(0.5 - index)
    return groups


def test_rollouts_come_back_from_parquet_as_they_went_in(tmp_path: Path) -> None:
    groups = two_groups()
    path = write_rollouts(tmp_path, 12, groups, batch_of(groups, 11, 0.7), distinct_refs(groups), run_seed=3)
    assert path.name == "step-000012.parquet"
    rows = read_rollouts(path)
    infos = [(g, info) for g in groups for info in g.samples]
    assert len(rows) == len(infos) == 4
    for row, (g, info) in zip(rows, infos, strict=True):
        sample: Sample = info.ref[info.row]
        assert (row["step"], row["prompt_id"], row["index"]) == (12, g.prompt.id, info.index)
        assert row["prompt_ids"] == g.prompt.token_ids
        assert row["completion_ids"] == sample.token_ids.tolist()
        assert np.array(row["rollout_logprobs"], dtype=np.float32).tobytes() == sample.logprobs.tobytes()
        assert row["versions"] == [
            {"version": 1, "start": 0, "end": 2},
            {"version": 2, "start": 2, "end": len(sample.token_ids)},
        ]
        assert (row["prompt"], row["completion"]) == (g.prompt.text, sample.text.replace("\ud800", "?"))
        assert (row["advantage"], row["finish_reason"], row["worker"]) == (
            g.advantages[info.index],
            sample.finish_reason,
            info.worker,
        )
        assert row["seed"] == sample_seed(3, g.prompt.id, info.index)
        assert (row["group"], row["loss_mask"], row["temperature"]) == (groups.index(g), g is groups[1], 0.7)
    assert [(r["reward"], r["reward_status"]) for r in rows] == [(None, "timeout")] * 2 + [(1.0, "ok")] * 2
    assert rows[0]["rewards"][1] == {
        "name": "style",
        "status": "timeout",
        "value": None,
        "detail": "10 s are over",
        "seconds": 10.0,
        "steps": [],
        "extra": None,
    }
    assert rows[0]["rewards"][0]["steps"] == [{"end": 0, "value": 0.25}, {"end": 2, "value": 0.75}]
    assert rows[0]["advantage_steps"] == []


def test_rollouts_open_with_pandas_and_datasets(tmp_path: Path) -> None:
    import datasets
    import pandas as pd

    groups = two_groups()
    for step in (1, 2):
        batch = batch_of(groups, step - 1)
        write_rollouts(tmp_path / "rollouts", step, groups, batch, distinct_refs(groups), run_seed=3)
    frame = pd.read_parquet(tmp_path / "rollouts")
    assert frame.groupby("step")["advantage"].sum().to_dict() == {1: 0.0, 2: 0.0}
    data = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "rollouts" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(data) == 8
    assert data[3]["completion_ids"] == groups[1].samples[1].ref[1].token_ids.tolist()


def test_a_sample_of_another_place_is_refused(tmp_path: Path) -> None:
    groups = two_groups()
    batch, refs = batch_of(groups, 0), distinct_refs(groups)
    other_order = replace(batch, samples=batch.samples[::-1])
    for wrong in ((batch, refs[::-1]), (other_order, refs)):
        with pytest.raises(AssertionError, match="is not that of"):
            write_rollouts(tmp_path, 1, groups, *wrong, run_seed=3)
    assert list(tmp_path.iterdir()) == []


def test_resume_removes_the_rollouts_it_will_write_again(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        (tmp_path / f"step-{step:06d}.parquet").write_bytes(b"x")
    (tmp_path / "step-000011.parquet.new").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert remove_after(tmp_path, 2) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "step-000001.parquet", "step-000002.parquet"]
    assert list(rollout_steps(tmp_path)) == [1, 2]
    assert remove_after(tmp_path / "absent", 0) == 0


def test_the_log_writes_aside_and_the_next_call_says_what_went_wrong(tmp_path: Path) -> None:
    groups = two_groups()
    asked: list[int] = []

    async def fetch(refs: list[Any]) -> list[Any]:
        asked.append(len(refs))
        if len(asked) == 2:
            raise ConnectionError("object lost")
        return refs

    async def main() -> None:
        log = ParquetRolloutLog(tmp_path, 3, fetch)
        batch = batch_of(groups, 0)
        await log.write(1, groups, batch)
        await log.write(2, groups, batch)
        assert list(rollout_steps(tmp_path)) == [1]
        with pytest.raises(ConnectionError, match="object lost"):
            await log.close()
        await log.write(3, groups, batch)
        await log.close()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert asked == [2, 2, 2]
    assert list(rollout_steps(tmp_path)) == [1, 3]
