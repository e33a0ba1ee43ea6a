"""Supervised fine-tuning over plain objects: its steps are timed and traced as those of a GRPO run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from grpo_ray.config.loading import build
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.prompts import SftExample
from grpo_ray.loop.sft_loop import SftLoop, sft_batch
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.manifest import FileSum
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.activity import Activity
from grpo_ray.telemetry.tracking import JsonlTracker, read_metrics
from grpo_ray.types import TrainBatch, UpdateReport


class Rows:
    fingerprint = "four rows"

    def __len__(self) -> int:
        return 4

    def item(self, row: int, epoch: int) -> SftExample:
        return SftExample(f"{epoch}/{row}", [1, 2], [3, 4, 5])


class Learner:
    def __init__(self) -> None:
        self.activity = Activity("learner-0")

    async def accumulate(self, part: TrainBatch) -> None:
        raise AssertionError(f"fine-tuning has no parts of batches: {part}")

    async def update(self, batch: TrainBatch) -> UpdateReport:
        with self.activity.span("update"):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.02)
        return UpdateReport(batch.step, {"loss/sft": 1.0}, 0.02, (self.activity.take(),))

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        with self.activity.span("hold"):
            time.sleep(0.01)

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        await asyncio.sleep(0.015)
        return {}

    async def load(self, place: CheckpointLocation) -> None: ...


def test_an_sft_run_tells_how_busy_its_learner_was_and_leaves_a_trace(tmp_path: Path) -> None:
    config = build(
        SftConfig,
        {
            "model": {"tiny": {}, "dtype": "float32"},
            "data": {"train": {"path": "x"}},
            "examples_per_step": 2,
            "num_steps": 3,
            "checkpoint": {"every_steps": 2},
        },
        "test",
    )
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    loop = SftLoop(
        config,
        Learner(),
        Cursor(Rows(), seed=1, shuffle=True),
        RunDir(tmp_path),
        [tracker],
        lambda event: None,
        sft_batch,
    )
    assert asyncio.run(asyncio.wait_for(loop.run(), 20)) == "finished"
    tracker.close()
    spans = [e for e in json.loads((tmp_path / "trace.json").read_text()) if e["ph"] == "X"]
    updates = [e["dur"] / 1e6 for e in spans if e["cat"] == "learner" and e["name"] == "update"]
    for line, seconds in zip(read_metrics(tmp_path / "metrics.jsonl"), updates, strict=True):
        assert line["busy/learner"] * line["time/step"] == pytest.approx(seconds, abs=1e-4)
        assert 0.02 <= seconds < line["time/step"]
        assert 0.04 <= line["time/update"] <= line["time/step"]
        assert line["throughput/tokens_per_s"] == pytest.approx(10 / line["time/step"])
    assert [(e["name"], e["args"]["step"]) for e in spans if e["cat"] == "learner"] == [
        ("hold", 1),
        ("update", 1),
        ("update", 2),
        ("hold", 3),
        ("update", 3),
    ]
    controller = [e["name"] for e in spans if e["cat"] == "controller" and not e["name"].startswith("step ")]
    assert controller == ["checkpoint", "update", "update", "checkpoint", "update", "checkpoint"]


def test_a_resumed_run_goes_on_in_the_data_where_it_was_stopped(tmp_path: Path) -> None:
    config = build(
        SftConfig,
        {
            "model": {"tiny": {}, "dtype": "float32"},
            "data": {"train": {"path": "x"}},
            "examples_per_step": 1,
            "num_steps": 8,
            "tracking": {"trace": False},
        },
        "test",
    )
    seen: list[str] = []

    def session(folder: Path, stop_at: int | None) -> SftLoop[SftExample]:
        def batch_of(step: int, examples: Sequence[SftExample]) -> TrainBatch:
            seen.extend(e.id for e in examples)
            if step == stop_at:
                loop.stop("SIGTERM")
            return sft_batch(step, examples)

        run = RunDir(folder)
        loop = SftLoop(config, Learner(), Cursor(Rows(), seed=1), run, [], lambda event: None, batch_of)
        return loop

    async def go(loop: SftLoop[SftExample]) -> str:
        if steps := loop.run_dir.steps():
            await loop.restore(steps[-1])
        return await asyncio.wait_for(loop.run(), 20)

    asyncio.run(go(session(tmp_path / "whole", None)))
    whole, seen[:] = list(seen), []
    # In the first epoch, at its very end, and in the second one.
    for stop_at in (1, 3, 5, None):
        asyncio.run(go(session(tmp_path / "cut", stop_at)))
    assert seen == whole
    assert len(set(whole)) == 8
