"""Learners' engines whose states go to the host and back between two steps, without Ray. See test_offload.py.

python -m tests.actors.learner.offloaded CASES FOLDER
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from itertools import chain
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from actors.learner.build import LearnerSpec, build_engine, build_reference, step
from actors.learner.group import _spec
from actors.learner.offload import HostMemory, offload, weights
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import pack
from grpo_ray.batch.sequence import Alone
from grpo_ray.config.schema import RunConfig
from tests.actors.learner.measured import _items

CPU = torch.device("cpu")


def main(cases: dict[str, str], folder: str) -> dict[str, dict[str, Any]]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return {name: observe(RunConfig.model_validate_json(config), folder) for name, config in cases.items()}


def observe(config: RunConfig, folder: str) -> dict[str, Any]:
    spec = _spec(config, folder, folder, has_gpus=False, num_steps=4)
    want = Learner(spec)
    want.train(0)
    want.train(1)
    expected = want.values()
    del want
    learner = Learner(spec)
    learner.train(0)
    first, before = learner.values(), learner.held()
    learner.offload(keep_weights=True)
    with_weights = learner.values(), learner.held()
    learner.offload(keep_weights=False)
    left = learner.held()
    learner.host.give_back()
    back, after = learner.values(), learner.held()
    learner.train(1)
    # A second turn takes the memory of the first.
    learner.offload(keep_weights=False)
    learner.host.give_back()
    return {
        "optimizer": type(learner.engine.optimizer).__name__,
        "sent_weights_are_whole": with_weights[0] == first,
        "back": back == first,
        "same_step": learner.values() == expected,
        "moved": expected != first,
        "held": before,
        "held_with_weights": with_weights[1],
        "left": left,
        "held_after": after,
        "weights": sum(
            {s._cdata: s.nbytes() for t in weights(learner.engine.module) if (s := t.untyped_storage())}.values()
        ),
    }


class Learner:
    def __init__(self, spec: LearnerSpec) -> None:
        torch.manual_seed(0)
        gc.collect()
        # Held, so that no address is given to another.
        self._others = storages()
        self.engine = build_engine(spec, CPU, Alone())
        self.reference: Any = build_reference(spec, CPU, Alone()) if spec.needs_reference_model else None
        for model in filter(None, (self.engine.module, self.reference)):
            for tensor in weights(model):
                if not tensor.untyped_storage().resizable():
                    # It lies in a file that is mapped to memory, as nothing does on a GPU.
                    tensor.data = tensor.data.clone()
        assert spec.algorithm is not None
        self.objective = GrpoObjective(spec.algorithm)
        self.host = HostMemory(CPU)

    def held(self) -> int:
        """Bytes of all tensors of this process, but for those before it and for what is on the host."""
        gc.collect()
        copies = (pieces or () for _, _, pieces in self.host._away)
        pieces = chain(*copies, *self.host._free.values())
        others = {*self._others, *(p.untyped_storage()._cdata for p in pieces)}
        return sum(s.nbytes() for key, s in storages().items() if key not in others)

    def train(self, seed: int) -> None:
        data = MicroBatchData.of(pack(_items(64, 16, seed), share_prompts=False), CPU)
        logps_C, entropy_C = self.engine(data.packed, 1.0)
        self.engine.backward(self.objective.loss(data, logps_C, entropy_C)[0], scale_wrt_gas=False)
        step(self.engine)

    def offload(self, *, keep_weights: bool) -> None:
        models = [] if self.reference is None else [getattr(self.reference, "module", self.reference)]
        offload(self.host, [self.engine], models, weights(self.engine.module) if keep_weights else ())

    def values(self) -> str:
        """A digest of the whole weights."""
        params, digest = list(self.engine.module.parameters()), hashlib.sha256()
        with deepspeed.zero.GatheredParameters(params, enabled=hasattr(params[0], "ds_id")):
            for param in params:
                # A copy: a storage that numpy has seen can't shrink any more.
                digest.update(param.detach().float().clone().numpy().tobytes())
        return digest.hexdigest()


def storages() -> dict[int, torch.UntypedStorage]:
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.device.type == "cpu"]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]), sys.argv[2])), flush=True)
