"""Every kind of worker, ended by Ray's memory monitor for real: in a cluster of its own whose threshold is always exceeded, so
that each dies while it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]
PROGRAM = """
import asyncio, json, sys
from pathlib import Path
import ray
from actors.control.controller_start import start_controller
from actors.learner.group import LearnerGroup
from actors.reward.pool import RewardPool
from actors.rollout.pool import RolloutPool
from grpo_ray.config.schema import RunConfig
from launch.run.follow import follow_events
from launch.run.live import LiveView

model, folder = sys.argv[1:]
config = RunConfig.model_validate({
    "model": {"path": model, "dtype": "float32"}, "data": {"train": {"path": "x"}, "max_prompt_length": 64}, "num_steps": 1,
    "rollout": {"max_completion_length": 16}, "learner": {"num_cpus": 0.5, "num_threads": 1},
    "reward": {"functions": [{"name": "accuracy"}], "num_cpus": 0}})
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=100 << 20,
         namespace="grpo-ray")

def follow():
    controller = start_controller("sft", config, Path(folder) / "run", None)
    controller.run.remote()
    follow_events(controller, LiveView(), Path(folder) / "run")

starts = {
    "reward": lambda: asyncio.run(RewardPool.create(config.reward, folder)),
    "learner": lambda: asyncio.run(LearnerGroup.create(config, model, folder)),
    "rollout": lambda: asyncio.run(RolloutPool.create(config, model, folder, has_gpus=False)),
    "controller": follow,
}
told = {}
for kind, start in starts.items():
    try:
        start()
        told[kind] = ["nothing", ""]
    except Exception as e:
        told[kind] = [type(e).__name__, str(e)]
print(json.dumps(told))
ray.shutdown()
"""


def test_every_kind_of_worker_that_is_ended_for_memory_is_told_in_a_few_lines(tiny_model: Path, tmp_path: Path) -> None:
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_memory_usage_threshold": "0.01",
        "RAY_memory_monitor_refresh_ms": "200",
    }
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_model, tmp_path], env=env, capture_output=True, text=True, timeout=500
    )
    assert output.returncode == 0, output.stderr
    told = json.loads(output.stdout.splitlines()[-1])
    assert {kind: error for kind, (error, _) in told.items()} == {
        "reward": "WorkerError",
        "learner": "NoMemoryError",
        "rollout": "WorkerError",
        "controller": "WorkerError",
    }, told
    for kind, (_, text) in told.items():
        assert "Ray ended it for lack of memory" in text, kind
        assert " of them by itself" in text, kind
        assert "\nLower " in text, kind
        assert len(text.splitlines()) <= 3, text
        assert "Traceback" not in text, kind
    assert f"`grpo-ray resume {tmp_path}/run` goes on" in told["controller"][1]
