"""DeepSpeed's ZeRO stages on one rank: seconds of a step, of the way to the host and back, and what stays on the device."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist

from actors.learner.build import LearnerSpec, build_engine, step
from actors.learner.offload import HostMemory, offload
from grpo_ray.batch.sequence import Alone
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.learner import CriticConfig, LearnerConfig
from grpo_ray.config.model import ModelConfig
from tests.gpu.kit.figures import DEVICE, ON_GPU, gpu_gib, model_folder, noting
from tests.gpu.kit.learner import micro_batch


def spec_of(stage: Literal[0, 1, 2, 3]) -> LearnerSpec:
    folder = str(model_folder())
    return LearnerSpec(
        model_path=folder,
        run_dir=folder,
        seed=1,
        model=ModelConfig(path=folder, dtype="bfloat16" if ON_GPU else "float32"),
        learner=LearnerConfig(zero_stage=stage),
        algorithm=AlgorithmConfig(),
        preferences=None,
        critic=CriticConfig(),
        weights=None,
        weights_backend="gloo",
        max_completion_length=1024,
        num_optimizer_steps=None,
        collective_timeout_s=60,
        sync_timeout_s=60,
    )


def join_alone() -> None:
    """Form a process group of this process."""
    import deepspeed

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if ON_GPU else "gloo", verbose=False)


def one_step(engine: Any) -> None:
    logps_C, _ = engine(micro_batch(0), 1.0)
    engine.backward(logps_C.mean(), scale_wrt_gas=False)
    step(engine)


def timed(work: Any) -> float:
    started = time.monotonic()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.monotonic() - started


def main() -> None:
    join_alone()
    stages: tuple[Literal[1, 2, 3], ...] = (1, 2, 3)
    for stage in stages:
        with noting("zero", stage=stage) as found:
            engine = build_engine(spec_of(stage), DEVICE, Alone())
            one_step(engine)
            found["step_s"] = timed(partial(one_step, engine))
            found["awake_gib"] = gpu_gib()
            memory = HostMemory(DEVICE)
            found["offload_s"] = timed(partial(offload, memory, [engine], [], ()))
            found["asleep_gib"] = gpu_gib()
            found["reload_s"] = timed(memory.give_back)
            one_step(engine)
        del engine
        gc.unfreeze()
        gc.collect()


if __name__ == "__main__":
    main()
