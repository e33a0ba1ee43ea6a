"""Engines and learners that share GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.end_to_end.runs import metrics, run, train, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_in_bf16_on_one_shared_gpu_ends_at_every_stage(stage: int, tmp_path: Path) -> None:
    args, run_dir = train(
        write_recipe(tmp_path),
        "colocated",
        "cluster.placement=colocated",
        "rollout.gpu_memory_utilization=0.5",
        "model.dtype=bfloat16",
        f"learner.zero_stage={stage}",
    )
    code, output = run(*args)
    assert code == 0, output
    assert max(m["mismatch/mean_abs"] for m in metrics(run_dir)) < 0.05


def test_a_run_on_one_shared_gpu_ends_and_samples_agree_with_the_learner(tmp_path: Path) -> None:
    args, run_dir = train(
        write_recipe(tmp_path), "colocated", "cluster.placement=colocated", "rollout.gpu_memory_utilization=0.5"
    )
    code, output = run(*args)
    assert code == 0, output
    assert max(m["mismatch/mean_abs"] for m in metrics(run_dir)) < 0.01


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("eager", ["true", "false"])
def test_an_engine_over_two_gpus_shares_them_with_two_learners_and_samples_what_they_train(
    eager: str, tmp_path: Path
) -> None:
    args, run_dir = train(
        write_recipe(tmp_path),
        "two",
        "cluster.placement=colocated",
        "rollout.tensor_parallel_size=2",
        "rollout.num_actors=1",
        "learner.num_actors=2",
        "rollout.gpu_memory_utilization=0.5",
        f"rollout.enforce_eager={eager}",
    )
    code, output = run(*args)
    assert code == 0, output
    assert max(m["mismatch/mean_abs"] for m in metrics(run_dir)) < 0.01
