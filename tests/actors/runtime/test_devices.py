"""Actors and GPUs, with GPUs that Ray counts and this machine does not have."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from actors import devices
from actors.devices import check_engine_has_gpu, gpus_of_new_node
from actors.reward.actor import RewardActor
from actors.reward.process import ScoringProcess
from actors.runtime import RayActors, own_process
from grpo_ray.config.reward import RewardConfig
from grpo_ray.errors import ResourceError
from grpo_ray.models import attention, cuda
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.cuda import driver_version, why_no_cuda
from tests.actors.learner.test_learner import make_config

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]
NVRM = "NVRM version: NVIDIA UNIX {}  {}  Release Build  (dvs-builder@U22)\nGCC version:  gcc version 12.3.0 (Ubuntu)\n"


@pytest.fixture(scope="module")
def ray_with_gpus() -> Iterator[None]:
    """A cluster of two GPUs; its processes see both, as on a machine that has them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
    os.environ.pop("CUDA_VISIBLE_DEVICES")
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before


class Worker:
    def __init__(self, run_dir: str) -> None:
        own_process(run_dir, "worker")

    def sees(self) -> tuple[str, str]:
        """What this process and one that it starts may see."""
        command = [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], end='')"]
        return os.environ["CUDA_VISIBLE_DEVICES"], subprocess.check_output(command, text=True)


@pytest.mark.parametrize(("num_gpus", "count"), [(0, 0), (0.5, 1), (1, 1), (2, 2)])
@pytest.mark.usefixtures("ray_with_gpus")
def test_an_actor_sees_the_gpus_that_ray_gave_it_and_no_others(tmp_path: Path, num_gpus: float, count: int) -> None:
    worker = RayActors().start(Worker, str(tmp_path), num_cpus=0, num_gpus=num_gpus)
    own, child = ray.get(worker.sees.remote(), timeout=120)
    assert own == child
    assert len([gpu for gpu in own.split(",") if gpu]) == count
    ray.kill(worker)


class RewardSpy(RewardActor):
    def environment(self) -> dict[str, str]:
        return ScoringProcess(self._config)._child.environment()


@pytest.mark.parametrize("name", ["exact_match", "reward_model"])
@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.usefixtures("ray_with_gpus")
def test_a_scoring_process_sees_no_gpu_that_its_worker_was_not_given(tmp_path: Path, name: str, num_gpus: int) -> None:
    """A reward that needs nothing of the host has an environment of its own, in which all would be visible."""
    function = {"name": name, "args": {"path": "a/b"}} if name == "reward_model" else {"name": name}
    config = RewardConfig.model_validate({"functions": [function], "num_gpus": num_gpus})
    actor = RayActors().start(RewardSpy, config, str(tmp_path), "reward-0", 60.0, num_cpus=0, num_gpus=num_gpus)
    seen = ray.get(actor.environment.remote(), timeout=120)["CUDA_VISIBLE_DEVICES"]
    assert (seen != "") == (num_gpus == 1)
    ray.kill(actor)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch built for CUDA")
@pytest.mark.usefixtures("ray_with_gpus")
def test_learners_on_gpus_refuse_a_torch_without_cuda_by_name(tiny_model: Path, tmp_path: Path) -> None:
    from actors.learner.group import LearnerGroup

    config = make_config(tiny_model, ranks=1, stage=2)
    with pytest.raises(ResourceError, match=r"learner-0 was given a GPU by Ray, and torch \S+ is built without CUDA"):
        asyncio.run(LearnerGroup.create(config, str(tiny_model), str(tmp_path), has_gpus=True))


@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch built for CUDA")
@pytest.mark.usefixtures("ray_with_gpus")
def test_an_engine_on_a_gpu_refuses_a_torch_without_cuda_by_name(tiny_model: Path, tmp_path: Path) -> None:
    from actors.rollout.actor import RolloutActor
    from grpo_ray.config.rollout import RolloutConfig

    args = (RolloutConfig(), str(tiny_model), "float32", 64, str(tmp_path), 0, 0, "gloo")
    actor = RayActors().start(RolloutActor, *args, num_cpus=0, num_gpus=1)
    with pytest.raises(ray.exceptions.RayActorError, match="rollout-0 was given a GPU by Ray, and torch"):
        ray.get(actor.ready.remote(), timeout=120)


def test_an_engine_of_vllm_for_gpus_without_one_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    check_engine_has_gpu("rollout-3")
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    with pytest.raises(ResourceError, match=r"rollout-3 was given no GPU by Ray.*rollout\.num_gpus above 0"):
        check_engine_has_gpu("rollout-3")
    monkeypatch.setattr(devices, "given_gpus", lambda: 1)
    check_engine_has_gpu("rollout-3")


@pytest.mark.parametrize(("version", "gpus"), [("2.13.0+cpu", 0), ("2.13.0", None), ("2.13.0+cu130", None)])
def test_a_node_counts_no_gpus_for_a_stack_of_cpus(
    monkeypatch: pytest.MonkeyPatch, version: str, gpus: int | None
) -> None:
    monkeypatch.setattr(devices.metadata, "version", lambda package: version)
    assert gpus_of_new_node() == gpus


@pytest.mark.parametrize(
    ("kind", "version"),
    [("x86_64 Kernel Module", "535.104.05"), ("Open Kernel Module for x86_64", "580.65.06"), ("aarch64", "1000.1")],
)
def test_the_drivers_version_is_read_from_the_kernel(tmp_path: Path, kind: str, version: str) -> None:
    (tmp_path / "version").write_text(NVRM.format(kind, version))
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("build", "driver", "told"),
    [
        ("13.0", "535.104.05", "the NVIDIA driver of this node is 535.104.05; .* which needs driver 580 or newer"),
        ("12.8", "470.82.01", "which needs driver 525 or newer"),
        ("13.0", None, "this node has no NVIDIA driver"),
        ("13.0", "580.65.06", "can't use it under driver 580.65.06: "),
        (None, "580.65.06", "is built without CUDA; install the GPU packages"),
    ],
)
def test_why_there_is_no_cuda_is_told_with_the_drivers_version(
    monkeypatch: pytest.MonkeyPatch, build: str | None, driver: str | None, told: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(cuda, "driver_version", lambda: driver)
    reason = why_no_cuda()
    assert reason is not None
    assert re.search(told, reason), reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_no_cuda() is None


def test_packed_attention_never_takes_cudnns_kernels() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        attention._register.cache_clear()
        choose_attention("sdpa", torch.device("cpu"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
