"""vLLM's own nccl and ipc transfers, driven by our sender, into a real engine on a GPU. Needs CUDA builds of torch and vllm."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.rollout.pool import RolloutPool
from actors.weights.protocol import EngineTarget, SendReport
from actors.weights.sync import RayWeightSync
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.types import Sample
from tests.actors.rollout.test_rollout import SAMPLING, reference_logprobs, requests, run_config

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
BUCKET_BYTES = 8 << 10
"""Smaller than the largest weight."""
SYNC_S = 60.0


@ray.remote(num_cpus=1, num_gpus=0.3)
class GpuLearner:
    def __init__(self, folder: str, backend: str) -> None:
        from transformers import AutoModelForCausalLM

        from actors.weights.sender import WeightSender, ZeroWeightSource

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
        self.source: Any = ZeroWeightSource(model, BUCKET_BYTES, torch.float32)
        self.sender = WeightSender(self.source, 0, backend, BUCKET_BYTES, SYNC_S)
        self.kills = 0

    def dawdle_after_the_first_weight(self, seconds: float) -> None:
        walk = self.source._walk

        def slowly() -> Iterator[tuple[str, torch.Tensor]]:
            self.source._walk = walk
            for number, weight in enumerate(walk()):
                time.sleep(seconds if number == 1 else 0.0)
                yield weight

        self.source._walk = slowly

    def kill_before_the_next_group(self, pid: int) -> None:
        self.kills = pid

    def weights_connect(self, targets: list[EngineTarget], generation: int) -> None:
        if self.kills:
            os.kill(self.kills, signal.SIGKILL)
            self.kills = 0
        self.sender.connect(targets, generation)

    def weights_send(self, version: int) -> SendReport:
        return self.sender.send(version)


class OneRank:
    unsent = False

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        await self.actor.weights_connect.remote(list(targets), generation)

    async def send_weights(self, version: int) -> SendReport:
        return await self.actor.weights_send.remote(version)


@pytest.mark.parametrize(("backend", "gpus"), [("ipc", 0.4), ("nccl", 1)])
@pytest.mark.usefixtures("local_ray")
def test_an_engine_samples_with_the_weights_it_was_sent(
    tiny_model: Path, tmp_path: Path, backend: str, gpus: float
) -> None:
    if torch.cuda.device_count() < (2 if backend == "nccl" else 1):
        pytest.skip(f"{backend} needs more GPUs than the {torch.cuda.device_count()} here")
    tiny = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, context=256, seed=21)
    new = build_tiny_model(tmp_path / "new", tiny)
    rollout = {"num_actors": 1, "num_gpus": gpus, "max_completion_length": 64, "gpu_memory_utilization": 0.3}
    config = run_config(tiny_model, rollout=rollout | {"enforce_eager": True}, weights={"backend": backend})

    async def sync_and_draw() -> tuple[int, list[Sample]]:
        pool = await RolloutPool.create(config, str(tiny_model), str(tmp_path), has_gpus=True)
        try:
            actor: Any = GpuLearner
            learner = actor.options(num_gpus=1 if backend == "nccl" else 0.3).remote(str(new), backend)
            report = await RayWeightSync(pool, OneRank(learner), timeout_s=SYNC_S).sync(5)
            infos = await asyncio.gather(*(pool.generate(r) for r in requests(8, SAMPLING)))
            return report.num_bytes, [(await i.ref)[i.row] for i in infos]
        finally:
            await pool.close()

    from transformers import AutoModelForCausalLM

    num_bytes, samples = asyncio.run(sync_and_draw())
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32).eval()
    assert num_bytes == 4 * sum(p.numel() for p in model.parameters())
    for sample in samples:
        assert {v.version for v in sample.versions} == {5}
        np.testing.assert_allclose(sample.logprobs, reference_logprobs(model, sample, SAMPLING.temperature), atol=5e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA devices")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_lost_in_mid_broadcast_costs_that_engine_and_nothing_else_within_a_minute(
    local_ray: None, tiny_model: Path, tmp_path: Path, end: signal.Signals
) -> None:
    rollout = {"num_actors": 2, "num_gpus": 1, "max_completion_length": 64, "gpu_memory_utilization": 0.3}
    config = run_config(tiny_model, rollout=rollout | {"enforce_eager": True}, weights={"backend": "nccl"})

    async def lose_one() -> None:
        pool = await RolloutPool.create(config, str(tiny_model), str(tmp_path), has_gpus=True)
        lost: list[tuple[float, str]] = []
        pool.on_trouble = lambda text: lost.append((time.monotonic(), text))
        try:
            actor: Any = GpuLearner
            learner = actor.options(num_gpus=1).remote(str(tiny_model), "nccl")
            sync = RayWeightSync(pool, OneRank(learner), timeout_s=SYNC_S)
            await sync.sync(1)
            lives = {t.name: t.incarnation for t in pool.engines()}
            await learner.dawdle_after_the_first_weight.remote(3.0)
            sending = asyncio.create_task(sync.sync(2))
            await asyncio.sleep(1.5)
            ended = time.monotonic()
            os.kill(pool.pids()["rollout-1"]["core_pid"], end)
            report = await sending
            assert report.num_engines == 1
            assert {t.name: t.incarnation for t in pool.engines()}["rollout-0"] == lives["rollout-0"]
            assert min(when for when, text in lost if "rollout-1 died" in text) - ended < SYNC_S
            infos = await asyncio.gather(*(pool.generate(r) for r in requests(8, SAMPLING)))
            assert {i.min_version for i in infos} == {2}
        finally:
            await pool.close()

    asyncio.run(lose_one())


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA devices")
def test_an_engine_lost_while_the_group_is_formed_costs_that_engine_and_nothing_else(
    local_ray: None, tiny_model: Path, tmp_path: Path
) -> None:
    rollout = {"num_actors": 2, "num_gpus": 1, "max_completion_length": 64, "gpu_memory_utilization": 0.3}
    config = run_config(tiny_model, rollout=rollout | {"enforce_eager": True}, weights={"backend": "nccl"})

    async def lose_one() -> None:
        pool = await RolloutPool.create(config, str(tiny_model), str(tmp_path), has_gpus=True)
        try:
            actor: Any = GpuLearner
            learner = actor.options(num_gpus=1).remote(str(tiny_model), "nccl")
            sync = RayWeightSync(pool, OneRank(learner), timeout_s=SYNC_S)
            lives = {t.name: t.incarnation for t in pool.engines()}
            await learner.kill_before_the_next_group.remote(pool.pids()["rollout-1"]["core_pid"])
            began = time.monotonic()
            assert (await sync.sync(1)).num_engines == 1
            assert time.monotonic() - began < SYNC_S
            assert {t.name: t.incarnation for t in pool.engines()}["rollout-0"] == lives["rollout-0"]
            infos = await asyncio.gather(*(pool.generate(r) for r in requests(8, SAMPLING)))
            assert {i.min_version for i in infos} == {1}
        finally:
            await pool.close()

    asyncio.run(lose_one())
