"""Small random models of many families, for comparisons with their own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_ray.batch.pack import PackItem
from grpo_ray.models.attention import choose_attention

VOCAB = 50
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": _MOE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "mixtral": _MOE,
    "qwen3_moe": _MOE | {"decoder_sparse_step": 1},
    "phimoe": _MOE,
    "granitemoe": _MOE,
    "minicpm3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
}
"""The options of the families that need others than the usual."""


def random_config(kind: str, **options: Any) -> Any:
    return AutoConfig.for_model(kind, **_SMALL | FAMILIES.get(kind, {}) | options)


def random_model(
    kind: str, *, attention: str = "packed", dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> nn.Module:
    """The model of a family with these options, all of its weights random: norms, biases and sinks too.

    Args:
        attention: `packed`, or a name of Transformers'.
    """
    torch.manual_seed(seed)
    name = choose_attention("sdpa", torch.device("cpu")) if attention == "packed" else attention
    model: nn.Module = AutoModelForCausalLM.from_config(
        random_config(kind, **options), attn_implementation=name, dtype=dtype
    )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1 if param.dim() > 1 else 0.5)
    return model


def ragged(lengths: list[tuple[int, int]], seed: int = 0) -> list[PackItem]:
    """Samples with prompts and completions of these lengths."""
    rng = np.random.default_rng(seed)
    return [
        PackItem(
            rng.integers(3, VOCAB, prompt), rng.integers(3, VOCAB, more), np.zeros(more, np.float32), 1.0, 1.0, number
        )
        for number, (prompt, more) in enumerate(lengths)
    ]


def own_logps(model: Any, items: list[PackItem], temperature: float = 1.0) -> Tensor:
    """[C] the completions' log-probabilities by the model's own forward, each sample by itself."""
    found = []
    for item in items:
        ids = torch.from_numpy(np.concatenate([item.prompt_ids, item.completion_ids]))[None]
        logps = (model(input_ids=ids, use_cache=False).logits[0] / temperature).log_softmax(-1)
        first = len(item.prompt_ids) - 1
        found.append(logps[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0])
    return torch.cat(found)


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """The gradient of each weight, of a fixed combination of the values; without those that have none."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, value.numel(), dtype=value.dtype)
    (weights * value).sum().backward()
    return {name.removeprefix("hf."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
