"""Every causal model class of Transformers, small: configs made of its own defaults and of the sizes here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from grpo_ray.models.features.dropout import without_dropout

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "n_embd", "n_inner", "d_inner", "embed_dim"), 64),
    **dict.fromkeys(("embedding_size", "emb_dim", "dim_ff", "ffn_dim", "d_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head", "mamba_head_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts_per_tok", "num_experts_per_token", "moe_k", "mamba_expand"), 2
    ),
    **dict.fromkeys(
        ("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups", "mamba_n_groups"), 1
    ),
    **dict.fromkeys(
        ("head_dim", "d_kv", "dim_head", "v_head_dim", "kv_lora_rank", "q_lora_rank", "index_head_dim"), 16
    ),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    # Shorter than the sequences that are compared.
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("conv_kernel", "linear_conv_kernel_dim", "linear_num_value_heads", "time_step_rank"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "index_topk", "index_n_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "seq_length", "max_seq_len"), 256),
    "linear_num_key_heads": 2,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HALF = ["linear_attention", "full_attention"]
_BY_LAYER = {
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
}
OF_KIND: dict[str, dict[str, Any]] = {
    **{kind: {"layer_types": _HALF} for kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")},
    **{kind: {"num_key_value_heads": 4} for kind in ("axk2", "deepseek_v32", "glm_moe_dsa")},
    "longcat_flash": {"head_dim": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {**_BY_LAYER, "laurel_rank": 16, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": {**_BY_LAYER, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "hy_v4": {"index_n_heads": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a kind needs beside or in place of these."""


def small_config(kind: str, larger: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """The config of a small model of this kind, without dropout.

    Args:
        larger: sizes in place of the usual ones, where the kind has them.
        options: those that it has to have.
    """
    make = CONFIG_MAPPING[kind]
    known = {*vars(make()), *make.attribute_map, *inspect.signature(make.__init__).parameters}
    sizes = {name: size for name, size in (SIZES | dict(larger or {})).items() if name in known}
    if "qk_rope_head_dim" in known:
        # It follows from the parts of a head.
        sizes.pop("head_dim", None)
    return without_dropout(make(**sizes | OF_KIND.get(kind, {}) | options))


def small_model(config: Any, attention: str | None = None) -> nn.Module:
    """The model of this config in fp32, the same in every call, with weights large enough that its tokens matter to each other."""
    from copy import deepcopy

    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf: nn.Module = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention)
    with torch.no_grad():
        for name, param in hf.named_parameters():
            if param.ndim >= 2 and not any(part in name for part in ("A_log", "conv", "dt_")):
                param.mul_(3)
    return hf
