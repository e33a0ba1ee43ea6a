"""The options of vLLM from a run's config: the environment and the options of an engine, and the parameters of one request."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.rollout.adapters import AdapterOptions, lora_args
from actors.rollout.vllm_schema import check_engine
from grpo_ray.config.rollout import LARGE_GPU_BYTES, RolloutConfig, check_without_gpus
from grpo_ray.errors import ConfigError
from grpo_ray.loop.stops import Stops
from grpo_ray.machine import total_memory
from grpo_ray.models.memory.kv_cache import DEFAULT_GB, check_kv_cache
from grpo_ray.types import SampleRequest

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams as VllmSamplingParams

CPU_BATCHED_TOKENS = 2048
GPU_BATCHED_TOKENS = 8192
LARGE_GPU_BATCHED_TOKENS = 16384
ROUTES = "actors.rollout.routes"
NGRAM = 3
"""The tokens of a text that has to be repeated, for its continuation to be proposed."""


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
    multimodal: bool = False,
) -> AsyncEngineArgs:
    """The engine's options, for the device that vLLM finds.

    Args:
        multimodal: whether the model is more than a language model; the rest of it is not loaded.

    Raises:
        ConfigError: vLLM has no option of `rollout.engine`, or a step of max_num_batched_tokens is too small here.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    check_engine(config)
    routes: dict[str, Any] = {}
    on_cpu = current_platform.is_cpu()
    kv_cache_gb = config.kv_cache_gb or (DEFAULT_GB if on_cpu else None)
    device: dict[str, Any] = {}
    if on_cpu:
        check_without_gpus(config)
        check_kv_cache(config, total_memory(), 1)
        # vLLM's CPU sampler crashes on a seeded request whose prompt is prefilled in pieces, so prompts are prefilled whole. The
        # default block of 128 tokens would keep shorter prompts out of the prefix cache.
        device = {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": tokens_at_once_on_cpu(config, max_model_len),
            "block_size": 32,
        }
        if config.keep_routing:
            # vLLM's own option needs its second model runner, whose kernels are Triton's; of cached prompts no experts are known.
            device["enable_prefix_caching"] = False
            routes["worker_extension_cls"] = f"{ROUTES}.{'Routed' if adapters else 'RoutedTransfers'}"
    else:
        memory = current_platform.get_device_total_memory()
        device = {"enable_sleep_mode": colocated, "max_num_batched_tokens": tokens_at_once_on_gpu(config, memory)}
        if config.engine_size > 1:
            # Inside a Ray actor vLLM would otherwise request GPUs of its own from Ray.
            device |= {"distributed_executor_backend": "mp", "data_parallel_backend": "mp"}
        if config.keep_routing:
            if config.engine.get("enable_prefix_caching") is False:
                raise ConfigError(
                    "rollout.keep_routing: on GPUs vLLM keeps the experts of tokens beside its cache of prompts, which "
                    "rollout.engine.enable_prefix_caching false switches off; leave one of them out"
                )
            routes["enable_return_routed_experts"] = True
    defaults: dict[str, Any] = {
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        **({"language_model_only": True} if multimodal else {}),
        **device,
        **config.engine,
    }
    return AsyncEngineArgs(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        seed=seed,
        trust_remote_code=trust_remote_code,
        tensor_parallel_size=config.tensor_parallel_size,
        data_parallel_size=config.data_parallel_size,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=None if kv_cache_gb is None else int(kv_cache_gb * 2**30),
        kv_cache_dtype=config.kv_cache_dtype,
        quantization=config.quantization,
        speculative_config=speculative_config(config),
        gpu_memory_utilization=config.gpu_memory_utilization,
        enforce_eager=on_cpu if config.enforce_eager is None else config.enforce_eager,
        logprobs_mode="processed_logprobs",
        scheduler_cls="actors.rollout.scheduler.bundling_scheduler",
        **defaults,
        **(_transfer_args(backend) if adapters is None else lora_args(adapters)) | routes,
    )


def tokens_at_once_on_gpu(config: RolloutConfig, memory: int) -> int:
    """The tokens of one step of an engine, as vLLM's own defaults are for its offline engine: its asynchronous one, in a process
    that is no server, would take 2,048.

    Args:
        memory: the bytes of the GPU.
    """
    usual = LARGE_GPU_BATCHED_TOKENS if memory >= LARGE_GPU_BYTES else GPU_BATCHED_TOKENS
    return config.max_num_batched_tokens or max(usual, config.max_num_seqs)


def tokens_at_once_on_cpu(config: RolloutConfig, max_model_len: int) -> int:
    """The tokens of one step of an engine on CPUs. Raises ConfigError if as many as are asked for hold no whole sample."""
    least = max(max_model_len, config.max_num_seqs)
    asked = config.max_num_batched_tokens or max(CPU_BATCHED_TOKENS, least)
    if asked < least:
        raise ConfigError(
            f"rollout.max_num_batched_tokens is {asked}, and on CPUs a step holds whole prompts: the longest sample has "
            f"{max_model_len} tokens, and rollout.max_num_seqs is {config.max_num_seqs}; raise it to {least} at least"
        )
    return asked


def speculative_config(config: RolloutConfig) -> dict[str, Any] | None:
    """vLLM's `speculative_config`. Its weight transfers reach the model alone, never the draft."""
    asked = config.speculative
    if asked is None:
        return None
    method = asked.method or ("ngram" if asked.model is None else "draft_model")
    options: dict[str, Any] = {"method": method, "num_speculative_tokens": asked.num_tokens}
    return options | ({"prompt_lookup_max": NGRAM} if asked.model is None else {"model": asked.model})


def can_fork(args: AsyncEngineArgs) -> bool:
    """Whether the core of this engine may be a fork: not where it computes on GPUs, or starts workers of its own."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu()) and args.tensor_parallel_size * args.data_parallel_size == 1


async def answers(engine: Any) -> None:
    """Wait until an AsyncLLM answers, whose routers then tell what they choose if they are to, on CPUs."""
    await engine.check_health()
    if str(engine.vllm_config.parallel_config.worker_extension_cls).startswith(ROUTES):
        await engine.collective_rpc("keep_routes")


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
