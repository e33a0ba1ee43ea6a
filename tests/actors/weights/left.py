"""A real vLLM model that leaves a transfer in the middle and then gets a whole one, in a process of its own. See
test_weight_leaving.py.

python -m tests.actors.weights.left MODEL OTHER_MODEL STOP
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import _custom_ops
from vllm.distributed.weight_transfer import packed_tensor
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

from actors.rollout.vllm_options import engine_args
from actors.weights.buckets import Digest
from actors.weights.leaving import Group, LeftError, told_to_leave
from grpo_ray.config.rollout import RolloutConfig

BUFFER = 32 << 10
PROMPT = [10 + k * 3 % 80 for k in range(20)]


class Sender:
    """A communicator at whose other end all weights are sent, or those of the first `stop` buckets."""

    world_size = 2

    def __init__(self, weights: dict[str, torch.Tensor], stop: int) -> None:
        self._bytes = torch.cat([w.contiguous().view(-1).view(torch.uint8) for w in weights.values()])
        self._stop = stop
        self._place = 0
        self.count = 0
        self.waiting, self._ended = threading.Event(), threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.count == self._stop:
            self.waiting.set()
            self._ended.wait(60.0)
            return
        tensor.copy_(self._bytes[self._place : self._place + len(tensor)])
        self._place += len(tensor)
        self.count += 1

    def destroy(self) -> None:
        self._ended.set()


def main(model: str, other: str, stop: str) -> None:
    stream = SimpleNamespace(synchronize=lambda: None)
    transfer: Any = packed_tensor
    transfer._get_streams = lambda _, number: (stream,) * number
    cuda: Any = torch.cuda
    cuda.stream = lambda _: nullcontext()
    torch.accelerator.current_device_index = lambda: 0
    # On CPUs vLLM computes with a copy of the weights that its layerwise reload never makes again; on GPUs there is none.
    kernels: Any = _custom_ops
    kernels._supports_onednn = False
    config = RolloutConfig(max_completion_length=32, max_num_seqs=8, kv_cache_gb=0.05)
    engine = LLMEngine.from_engine_args(engine_args(config, model, "float32", 128, 1, "nccl", trust_remote_code=False))
    weights = load_file(Path(other) / "model.safetensors")
    info = {
        "names": list(weights),
        "dtype_names": ["float32"] * len(weights),
        "shapes": [list(w.shape) for w in weights.values()],
    }

    def on_worker(work: Callable[[Any], Any]) -> Any:
        (result,) = engine.collective_rpc(work)
        return result

    def connect(sender: Sender) -> Callable[[Any], None]:
        def connected(worker: Any) -> None:
            transfer = worker.weight_transfer_engine
            transfer.model_update_group = Group(sender)
            transfer.packed, transfer.packed_buffer_size_bytes = True, BUFFER

        return connected

    broken = Sender(weights, int(stop))
    on_worker(connect(broken))
    on_worker(lambda worker: worker.start_weight_update())

    def leave() -> None:
        broken.waiting.wait(60.0)
        with told_to_leave():
            broken._ended.wait(60.0)

    leaving = threading.Thread(target=leave)
    leaving.start()
    left = False
    try:
        on_worker(lambda worker: worker.update_weights(info))
    except LeftError:
        left = True
    leaving.join()
    on_worker(lambda worker: worker.weight_transfer_leave())
    whole = Sender(weights, -1)
    on_worker(connect(whole))
    on_worker(lambda worker: worker.start_weight_update())
    on_worker(lambda worker: worker.update_weights(info))
    digest = on_worker(lambda worker: worker.weight_transfer_digest())
    on_worker(lambda worker: worker.finish_weight_update())
    expected = Digest()
    for name, weight in weights.items():
        expected.add(name, weight)
    print(
        json.dumps(
            {
                "left": left,
                "buckets": [broken.count, whole.count],
                "same_digest": digest == expected.hex(),
                "apart": apart(engine, other),
            }
        )
    )


def apart(engine: LLMEngine, model: str) -> float:
    """The largest difference between the engine's log-probabilities and those of the model in this folder."""
    from transformers import AutoModelForCausalLM

    engine.add_request("0", {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=16, logprobs=0, temperature=1.0))
    (completion,) = next(o.outputs for _ in range(100) for o in engine.step() if o.finished)
    tokens = list(completion.token_ids)
    reported = [place[token].logprob for place, token in zip(completion.logprobs, tokens, strict=True)]
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = hf(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    own = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return float((own - torch.tensor(reported)).abs().max())


if __name__ == "__main__":
    main(*sys.argv[1:])
