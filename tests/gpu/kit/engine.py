"""A vLLM engine that shares its GPU with this process: start, sleep and wake, weights over CUDA IPC at three sizes of buckets, and
its log-probabilities against the learner's.

vLLM's own ipc transfer is used: the checked one of this project needs Ray, which call 2 brings.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from threading import Thread
from typing import Any

import numpy as np
import torch

import actors.rollout.vllm_options as vllm_options
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.config.rollout import RolloutConfig
from tests.gpu.kit.figures import ON_GPU, gpu_gib, model_folder, noting
from tests.gpu.kit.learner import load

LENGTH = 2048 if ON_GPU else 256
BUCKETS_MB = (64, 512, 1024)
CALL_S = 120


def transfer_args(backend: str) -> dict[str, Any]:
    """Stands for `vllm_options._transfer_args`, which needs Ray."""
    from vllm.config.weight_transfer import WeightTransferConfig

    return {"weight_transfer_config": WeightTransferConfig(backend="ipc")} if ON_GPU else {}


def engine_options(**options: Any) -> Any:
    """The options of a colocated engine."""
    vllm_options._transfer_args = transfer_args
    config = RolloutConfig(max_completion_length=LENGTH // 2, gpu_memory_utilization=0.5, **options)
    dtype = "bfloat16" if ON_GPU else "float32"
    return vllm_options.engine_args(
        config, str(model_folder()), dtype, LENGTH, 1, "ipc", trust_remote_code=False, colocated=True
    )


class Loop:
    """An event loop in a thread, for calls from code that waits."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(CALL_S)


class Client:
    """vLLM's `VLLMWeightSyncClient` over an AsyncLLM of this process."""

    def __init__(self, engine: Any, loop: Loop) -> None:
        self.engine = engine
        self.loop = loop

    def get_world_size(self) -> int:
        return 1

    def init_weight_transfer_engine(self, init_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self.loop.run(self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info)))

    def start_weight_update(self) -> None:
        self.loop.run(self.engine.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self.loop.run(self.engine.update_weights(WeightTransferUpdateRequest(update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.loop.run(self.engine.finish_weight_update(weight_version))


async def start() -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(engine_options(enforce_eager=True))


async def sample(engine: Any, number: int, tokens: int) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    params = SamplingParams(
        seed=number, max_tokens=tokens, logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    prompt = {"prompt_token_ids": [10 + (number * 7 + k * 3) % 60 for k in range(20)]}
    async for output in engine.generate(prompt, params, f"{number}-{tokens}"):
        final = output
    return final


def check_sleep(engine: Any, loop: Loop) -> None:
    for level in (1, 2):
        with noting("sleep", level=level) as found:
            found["awake_gib"] = gpu_gib()
            started = time.monotonic()
            loop.run(engine.sleep(level=level, mode="wait"))
            found |= {"sleep_s": time.monotonic() - started, "asleep_gib": gpu_gib()}
            for part in ("weights", "kv_cache"):
                started = time.monotonic()
                loop.run(engine.wake_up([part]))
                found |= {f"wake_{part}_s": time.monotonic() - started, f"{part}_gib": gpu_gib()}


def check_transfer(engine: Any, loop: Loop, module: torch.nn.Module) -> None:
    """A bucket below the largest tensor, 445 MiB, has to fail; the others carry everything."""
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    for megabytes in BUCKETS_MB:
        with noting("transfer", bucket_mb=megabytes) as found:
            info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=megabytes << 20, rank=0)
            trainer = WeightTransferTrainerFactory.trainer_init(
                info, client=Client(engine, loop), source=ModuleSource(module)
            )
            for times in ("first_s", "second_s"):
                loop.run(engine.pause_generation(mode="keep", clear_cache=True))
                started = time.monotonic()
                trainer.send_weights()
                found[times] = time.monotonic() - started
                loop.run(engine.resume_generation())


def check_logprobs(engine: Any, loop: Loop, model: Any) -> None:
    with noting("logprobs") as found:
        apart = []
        for number in range(8):
            final = loop.run(sample(engine, number, LENGTH // 4))
            completion = final.outputs[0]
            theirs = np.array([next(iter(place.values())).logprob for place in completion.logprobs], np.float32)
            ids = np.array(completion.token_ids, np.int32)
            item = PackItem(np.array(final.prompt_token_ids, np.int32), ids, theirs, 1.0, 1.0, number)
            with torch.no_grad():
                ours = model(pack([item]), 1.0)[0].float().cpu().numpy()
            apart.append(np.abs(ours - theirs))
        found |= {"mean": float(np.concatenate(apart).mean()), "max": float(np.concatenate(apart).max())}


def main() -> None:
    loop = Loop()
    started = time.monotonic()
    with noting("start") as found:
        engine = loop.run(start())
        found |= {"seconds": time.monotonic() - started, "gib": gpu_gib()}
    model = load()
    check_logprobs(engine, loop, model)
    if ON_GPU:
        check_sleep(engine, loop)
        # What level 2 has dropped comes by the transfer.
        check_transfer(engine, loop, model.hf)
        check_logprobs(engine, loop, model)
    engine.shutdown()


if __name__ == "__main__":
    main()
