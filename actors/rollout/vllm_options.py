"""The options of vLLM from a run's config: the environment and the options of an engine, and the parameters of one request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.rollout.adapters import AdapterOptions, lora_args
from grpo_ray.config.schema import RolloutConfig
from grpo_ray.loop.stops import Stops
from grpo_ray.machine import total_memory
from grpo_ray.models.kv_cache import DEFAULT_GB, check_kv_cache
from grpo_ray.types import SampleRequest

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

CPU_BATCHED_TOKENS = 2048


def rollout_env(config: RolloutConfig, *, on_gpu: bool, backend: str) -> dict[str, str]:
    """The environment of the actor's process. It must be set before vllm is imported."""
    env = {
        "OMP_NUM_THREADS": str(config.num_threads or 1),
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if on_gpu:
        # Every request has a seed and wants the log-probabilities of what is left, for which that sampler is never taken; without
        # this vLLM imports and may compile it all the same.
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    else:
        # This saves a process and 4 s of start-up: the worker lives in the engine's process.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # vLLM sets them for its core, which may be a fork (see `forked_core`) where torch has already read them.
        env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    if backend == "ipc":
        # CUDA IPC handles are not plain data; they travel between processes of this run only.
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    return env | config.env


def engine_args(
    config: RolloutConfig,
    model: str,
    dtype: str,
    max_model_len: int,
    seed: int,
    backend: str,
    *,
    trust_remote_code: bool,
    adapters: AdapterOptions | None = None,
    colocated: bool = False,
) -> AsyncEngineArgs:
    """The engine's options, for the device that vLLM finds."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    kv_cache_gb = config.kv_cache_gb or (DEFAULT_GB if on_cpu else None)
    device: dict[str, Any] = {}
    if on_cpu:
        check_kv_cache(config, total_memory(), 1)
        # vLLM's CPU sampler crashes on a seeded request whose prompt is prefilled in pieces, so prompts are prefilled whole. The
        # default block of 128 tokens would keep shorter prompts out of the prefix cache.
        device = {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, max_model_len, config.max_num_seqs),
            "block_size": 32,
        }
    else:
        device = {"enable_sleep_mode": colocated}
        if config.tensor_parallel_size > 1:
            # Inside a Ray actor vLLM would otherwise request GPUs of its own from Ray.
            device["distributed_executor_backend"] = "mp"
    return AsyncEngineArgs(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        seed=seed,
        trust_remote_code=trust_remote_code,
        tensor_parallel_size=config.tensor_parallel_size,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=None if kv_cache_gb is None else int(kv_cache_gb * 2**30),
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=on_cpu if config.enforce_eager is None else config.enforce_eager,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        scheduler_cls="actors.rollout.scheduler.bundling_scheduler",
        **device,
        **(_transfer_args(backend) if adapters is None else lora_args(adapters)),
    )


def can_fork(args: AsyncEngineArgs) -> bool:
    """Whether the core of this engine may be a fork: not where it computes on GPUs, or starts workers of its own."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu()) and args.tensor_parallel_size == 1


def _transfer_args(backend: str) -> dict[str, Any]:
    """The options of an engine that receives whole weights."""
    from vllm.config.weight_transfer import WeightTransferConfig

    from actors.weights.backend import WORKER_BACKENDS

    return {
        "weight_transfer_config": WeightTransferConfig(backend=WORKER_BACKENDS[backend]),
        "worker_extension_cls": "actors.weights.backend.TransferExtension",
    }


def sampling_params(request: SampleRequest, stops: Stops) -> VllmSamplingParams:
    from vllm.sampling_params import RequestOutputKind
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

    p = request.params
    return VllmSamplingParams(
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=p.top_k,
        min_p=p.min_p,
        max_tokens=p.max_tokens,
        seed=request.seed,
        stop=list(stops.strings),
        stop_token_ids=list(stops.token_ids),
        # Stop strings are found in text; without them the text is decoded once, at the end.
        detokenize=bool(stops.strings),
        skip_special_tokens=False,
        include_stop_str_in_output=True,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
