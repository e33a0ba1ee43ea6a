"""Actors on a machine with GPUs: each sees what Ray gave it."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from actors.runtime import RayActors, own_process
from grpo_ray.models.cuda import driver_version, why_no_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class Worker:
    def __init__(self, run_dir: str) -> None:
        own_process(run_dir, "worker")

    def num_gpus(self) -> int:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("asked", "seen"), [(0, 0), (0.5, 1), (1, 1)])
def test_an_actor_computes_on_the_gpus_that_ray_gave_it_and_no_others(tmp_path: Path, asked: float, seen: int) -> None:
    worker = RayActors().start(Worker, str(tmp_path), num_cpus=0, num_gpus=asked)
    assert ray.get(worker.num_gpus.remote(), timeout=120) == seen
    ray.kill(worker)


def test_the_driver_is_known_and_new_enough() -> None:
    driver = driver_version()
    assert driver is not None
    assert int(driver.partition(".")[0]) >= 580
    assert why_no_cuda() is None
