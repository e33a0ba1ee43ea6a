"""Checks, before an engine starts, that the requested KV cache fits into memory with everything else."""

from __future__ import annotations

from typing import Any

from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ResourceError

DEFAULT_GB = 0.25
"""The KV cache of an engine on CPUs if rollout.kv_cache_gb is not given."""
_GIB = 1 << 30
SHARE = 0.85
"""The fraction of memory for caches and weights; the rest is for Python, libraries and the learner's computation."""


def check_kv_cache(
    rollout: RolloutConfig, memory: int, num_engines: int, weights: int = 0, what: str = "machine"
) -> None:
    """Check that the KV caches and weights of all engines fit.

    Args:
        rollout: the config with `kv_cache_gb` of each engine.
        memory: the number of bytes of the machine, or of one GPU.
        num_engines: the number of engines that share it.
        weights: the bytes of weights that each of them holds besides.
        what: `machine` or `GPU`.

    Raises:
        ResourceError: the memory does not suffice; says how much fits.
    """
    asked = DEFAULT_GB if rollout.kv_cache_gb is None else rollout.kv_cache_gb
    room = SHARE * memory / num_engines - weights
    if asked * _GIB <= room:
        return
    fits = int(max(0.0, room) / _GIB * 10) / 10
    engines = "the engine has" if num_engines == 1 else f"each of {num_engines} engines on it has"
    most = (
        f"lower it to {fits:g} at most"
        if fits > 0
        else "not even the weights fit: use fewer engines or a smaller model"
    )
    beside = f", beside {weights / _GIB:.1f} GiB of weights" if weights >= _GIB / 10 else ""
    raise ResourceError(
        f"rollout.kv_cache_gb is {asked:g}, which {engines}{beside}, and the {what} has {memory / _GIB:.1f} GiB of memory; {most}"
    )


BLOCK = 32
"""The number of tokens of a block of an engine's cache on CPUs."""


def check_one_sample(rollout: RolloutConfig, model_config: Any, tokens: int, width: int) -> None:
    """Check that the cache can hold the longest sample, since otherwise vLLM does not start. Models in which not all layers keep
    every token's keys and values are not checked.

    Args:
        model_config: the config as Transformers reads it.
        tokens: the number of tokens of the longest sample, with its prompt.
        width: the bytes of a number in the cache.

    Raises:
        ResourceError: the cache is too small; says how much is enough.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if odd or getattr(text, "kv_lora_rank", None) or getattr(text, "sliding_window", None):
        return
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    needed = -(-tokens // BLOCK) * BLOCK * 2 * text.num_hidden_layers * heads * size * width
    asked = DEFAULT_GB if rollout.kv_cache_gb is None else rollout.kv_cache_gb
    if asked * _GIB < needed:
        enough = -(-needed * 1000 // _GIB) / 1000
        raise ResourceError(
            f"rollout.kv_cache_gb is {asked:g}, and a sample of up to {tokens} tokens takes {needed / _GIB:.2g} GiB of it; raise "
            f"it to {enough:g} at least, or shorten data.max_prompt_length or rollout.max_completion_length"
        )


def check_gpu_shares(config: RunConfig) -> None:
    """Raises ResourceError if the engines that share one GPU request more than all of it."""
    rollout = config.rollout
    share = rollout.num_gpus
    if config.colocated or not share or share >= 1 or rollout.kv_cache_gb is not None:
        return
    engines = min(rollout.num_actors, int(1 / share))
    if engines * rollout.gpu_memory_utilization > 1:
        raise ResourceError(
            f"rollout.num_gpus {share:g} puts {engines} engines on a GPU, and each takes rollout.gpu_memory_utilization "
            f"{rollout.gpu_memory_utilization:g} of its memory; lower that to {int(95 / engines) / 100:g}"
        )
