"""A learner's engine in a process of its own, without Ray: what it holds after two steps. See test_memory.py.

python -m tests.actors.learner.measured CONFIG FOLDER TOKENS SAMPLE
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist

from actors.learner.build import build_engine, build_reference, step
from actors.learner.group import _spec
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.batch.sequence import Alone
from grpo_ray.config.schema import RunConfig
from grpo_ray.models.lora import adapters_off

STEPS, MICRO_BATCHES = 2, 2


def main(config: RunConfig, folder: str, tokens: int, sample: int) -> int:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    before = psutil.Process().memory_info().rss
    spec, device = _spec(config, folder, folder, has_gpus=False, num_steps=STEPS), torch.device("cpu")
    engine = build_engine(spec, device, Alone())
    reference = build_reference(spec, device, Alone()) if spec.needs_reference_model else None
    objective = GrpoObjective(config.algorithm)
    for number in range(STEPS):
        for micro in range(MICRO_BATCHES):
            data = MicroBatchData.of(pack(_items(tokens, sample, 7 * number + micro), share_prompts=False), device)
            if spec.needs_reference:
                with torch.no_grad(), nullcontext() if reference is not None else adapters_off(engine.module.hf):
                    data.ref_logps_C = (reference or engine)(data.packed, 1.0)[0]
            logps_C, entropy_C = engine(data.packed, 1.0)
            engine.backward(objective.loss(data, logps_C, entropy_C)[0], scale_wrt_gas=False)
        step(engine)
    return int(psutil.Process().memory_info().rss) - before


def _items(tokens: int, sample: int, seed: int) -> list[PackItem]:
    rng = np.random.default_rng(seed)
    half, count = sample // 2, tokens // sample
    reported = np.full(half, -5.0, dtype=np.float32)
    return [
        PackItem(prompt, completion, reported, float(rng.normal()), 1 / tokens, i)
        for i in range(count)
        for prompt, completion in [rng.integers(3, 60, (2, half)).astype(np.int32)]
    ]


if __name__ == "__main__":
    found = main(RunConfig.model_validate_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps({"bytes": found}), flush=True)
