"""Two steps of engines that are loaded shard by shard and whole, in a process of its own, without Ray. See test_shards.py.

python -m tests.actors.learner.loaded FOLDER [KEY=VALUE ...]
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from actors.learner import build, zero_state
from actors.learner.group import _spec
from actors.learner.state import gather
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import pack
from grpo_ray.batch.sequence import Alone
from tests.actors.learner.measured import _items
from tests.recipes import run_config

DEVICE = torch.device("cpu")


def trained(folder: str, overrides: list[str]) -> dict[str, Any]:
    """Norms of gradients, and checksums of all that two steps have made."""
    config = run_config(
        f"model={{path: {folder}, tiny: null}}",
        "learner={zero_stage: 3, learning_rate: 0.01}",
        "rollout.max_completion_length=64",
        "data.max_prompt_length=64",
        *overrides,
    )
    spec = _spec(config, folder, folder, has_gpus=False, num_steps=2)
    torch.manual_seed(3)
    engine = build.build_engine(spec, DEVICE, Alone())
    reference: Any = build.build_reference(spec, DEVICE, Alone()) if spec.needs_reference_model else None
    objective, norms = GrpoObjective(config.algorithm), []
    for number in range(2):
        data = MicroBatchData.of(pack(_items(256, 64, number), share_prompts=False), DEVICE)
        if reference is not None:
            with torch.no_grad():
                data.ref_logps_C = reference(data.packed, 1.0)[0]
        logps_C, entropy_C = engine(data.packed, 1.0)
        engine.backward(objective.loss(data, logps_C, entropy_C)[0], scale_wrt_gas=False)
        norms.append(build.step(engine))
    found = {f"master {p.name}": p.of(p.flat) for p in zero_state._pieces(engine, share=True)}
    found |= {f"weight {name}": value for name, value in gather(engine.module.hf).items()}
    found |= {f"buffer {name}": value for name, value in engine.module.named_buffers()}
    if reference is not None:
        found |= {f"reference {name}": value for name, value in gather(reference.module.hf).items()}
    return {"norms": norms} | {name: _digest(value) for name, value in found.items()}


def _digest(value: torch.Tensor) -> str:
    data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {hashlib.sha256(data).hexdigest()}"


def main(folder: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as meeting:
        dist.init_process_group("gloo", store=dist.FileStore(f"{meeting}/store", 1), rank=0, world_size=1)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        shards = trained(folder, overrides)
        build.can_shard = lambda spec: False
        build.stored_dtype = lambda path: torch.float32
        print(json.dumps([shards, trained(folder, overrides)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
