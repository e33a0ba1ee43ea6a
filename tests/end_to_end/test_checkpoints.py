"""Checkpoints of whole runs: in a store without a rename, broken, and with groups that were sampled ahead."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import LIMIT_S, NUM_STEPS, finish, launch, ledger, metrics, run, train, write_recipe

pytestmark = pytest.mark.timeout(3 * LIMIT_S)


@pytest.mark.slow
def test_a_run_that_samples_ahead_is_resumed_past_a_broken_checkpoint_in_a_store_by_fsspec(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    ahead = ["algorithm.max_staleness=2", f"checkpoint.path=file://{bucket}", "checkpoint.every_steps=1"]
    args, run_dir = train(write_recipe(tmp_path), "cut", *ahead)
    process = launch(*args)
    deadline = time.monotonic() + LIMIT_S
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 3:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "checkpoints" not in {p.name for p in run_dir.iterdir()}
    before, newest = sorted(bucket.glob("cut/step-*"))
    assert len(metrics(run_dir)) == int(newest.name.removeprefix("step-")), (
        "the end of the run waits for its checkpoint"
    )
    broken = newest / "learner" / "rank-0" / "policy.safetensors"
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    files = json.loads((before / "manifest.json").read_text())["files"]
    assert {"loop/loop.json", "loop/groups.parquet", "hf/model.safetensors"} < set(files)

    code, output = run("resume", str(run_dir))
    assert code == 0, output
    told = output.replace("\n", " ")
    assert (
        f"{newest.name.removeprefix('step-').lstrip('0')} is broken: learner/rank-0/policy.safetensors is damaged"
        in told
    )
    assert f"after step {before.name.removeprefix('step-').lstrip('0')}" in told
    assert "finished groups are taken from the checkpoint" in told
    lines = metrics(run_dir)
    assert [m["step"] for m in lines] == list(range(1, NUM_STEPS + 1))
    assert max(m["staleness/max"] for m in lines) <= 2
    rows = ledger(run_dir)
    assert [row[2] for row in rows] == ["trained"] * 4 * NUM_STEPS
    assert len({row[0] for row in rows}) == 4 * NUM_STEPS
    assert all(m["time/checkpoint"] > 0 for m in lines)
    assert sum("checkpoint/background_s" in m for m in lines) >= 2
