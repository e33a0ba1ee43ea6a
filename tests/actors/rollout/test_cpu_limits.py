"""What vLLM's kernels on CPUs refuse of a model is refused by its config, and nothing else is."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from actors.rollout.cpu_limits import DELTA_HEADS, HEADS, WITH_TORCHVISION, check_cpu_limits
from grpo_ray.config.model import LoraConfig, ModelConfig
from grpo_ray.errors import ConfigError
from tests.actors.rollout.vllm_imports import classes, imports_torchvision

FP32, BF16 = (ModelConfig(path="model", dtype=dtype) for dtype in ("float32", "bfloat16"))
SMALL = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def next_config(key: int = 64, value: int = 64) -> Qwen3NextConfig:
    return Qwen3NextConfig(**SMALL, head_dim=64, linear_key_head_dim=key, linear_value_head_dim=value)


def latent(rank: int = 512, rotary: int = 64, nope: int = 128) -> DeepseekV3Config:
    return DeepseekV3Config(**SMALL, kv_lora_rank=rank, qk_rope_head_dim=rotary, qk_nope_head_dim=nope)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=128),
        Gemma3TextConfig(**SMALL, head_dim=256),
        Qwen3MoeConfig(**SMALL, num_experts=4),
        GptOssConfig(**SMALL, head_dim=64, intermediate_size=96, num_local_experts=4),
        MambaConfig(hidden_size=100),
        latent(),
    ],
    ids=lambda config: config.model_type,
)
def test_a_model_that_the_kernels_take_is_not_refused(config: Any) -> None:
    check_cpu_limits(config, FP32)
    check_cpu_limits(config, BF16)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (Qwen2Config(**SMALL | {"num_attention_heads": 16}), "its attention heads have 16 dimensions"),
        (
            Qwen3Config(**SMALL, head_dim=144),
            "its attention heads have 144 dimensions, and the kernels take 32, 48, 64",
        ),
        (latent(rank=32), "kv_lora_rank 32 and qk_rope_head_dim 64, and the kernel takes 512 and 64 alone"),
        (latent(rotary=32), "kv_lora_rank 512 and qk_rope_head_dim 32"),
        (Qwen3MoeConfig(**SMALL | {"hidden_size": 144}, head_dim=32, num_experts=4), "hidden_size of 144"),
        (GptOssConfig(**SMALL, head_dim=64, intermediate_size=80, num_local_experts=4), "intermediate_size of 80"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused_with_those_that_one_takes(config: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=f"vLLM can't sample this {config.model_type} on CPUs: .*{why}"):
        check_cpu_limits(config, BF16)


def test_gated_delta_nets_want_bfloat16_heads_of_64_or_128_and_no_adapters() -> None:
    for size in DELTA_HEADS:
        check_cpu_limits(next_config(size, size), BF16)
    adapters = BF16.model_copy(update={"lora": LoraConfig(transfer="adapter")})
    for config, model, why in (
        (next_config(), FP32, r"need model\.dtype=bfloat16, which is float32"),
        (
            next_config(32, 32),
            BF16,
            "32 dimensions for keys and 32 for values, and the kernel takes 64 or 128 for both",
        ),
        (next_config(64, 128), BF16, "64 dimensions for keys and 128 for values"),
        (next_config(), adapters, r"take no adapters there: use model\.lora\.transfer=merged"),
    ):
        with pytest.raises(ConfigError, match=why):
            check_cpu_limits(config, model)
    with pytest.raises(ConfigError, match=r"model\.dtype=bfloat16.*; the heads of its gated delta nets have 32"):
        check_cpu_limits(next_config(32, 32), FP32)


@pytest.mark.parametrize("installed", [True, False])
def test_classes_that_import_torchvision_are_refused_where_it_is_not_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Qwen3_5TextConfig(
        **SMALL,
        head_dim=64,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        architectures=["Qwen3_5ForCausalLM"],
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    if installed:
        check_cpu_limits(config, BF16)
        return
    with pytest.raises(ConfigError, match=r"its class Qwen3_5ForCausalLM imports torchvision, which is not installed"):
        check_cpu_limits(config, BF16)


def test_the_classes_are_those_that_import_torchvision_of_all_that_transformers_has_too() -> None:
    pytest.importorskip("vllm")
    of_vllm = {name: imports_torchvision(module) for name, module in classes().items() if hasattr(transformers, name)}
    assert len(of_vllm) > 100
    assert {n for n, needed in of_vllm.items() if needed} == {n for n in of_vllm if n.startswith(WITH_TORCHVISION)}


def test_the_sizes_are_those_that_the_kernels_take() -> None:
    ops = pytest.importorskip("vllm._custom_ops")

    def attends(size: int) -> bool:
        try:
            ops.cpu_attn_get_scheduler_metadata(
                num_reqs=1,
                num_heads=2,
                num_kv_heads=1,
                head_dim=size,
                seq_lens=torch.tensor([4], dtype=torch.int32),
                dtype=torch.float32,
                query_start_loc=torch.tensor([0, 4], dtype=torch.int32),
                causal=True,
                sliding_window_size=-1,
                isa="vec",
                enable_kv_split=False,
                dynamic_causal=None,
                kv_cache_dtype="auto",
            )
        except RuntimeError:
            return False
        return True

    def remembers(size: int) -> bool:
        length, heads = 8, 2
        query, key, value = (torch.ones(1, length, heads, size, dtype=torch.bfloat16) for _ in range(3))
        try:
            ops.chunk_gated_delta_rule_cpu(
                query=query,
                key=key,
                value=value,
                g=-torch.ones(1, length, heads),
                beta=torch.ones(1, length, heads, dtype=torch.bfloat16),
                initial_state=torch.zeros(1, heads, size, size),
                output_final_state=True,
                cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
                head_first=False,
                use_qk_l2norm_in_kernel=True,
                initial_state_indices=torch.tensor([0], dtype=torch.int32),
            )
        except RuntimeError:
            return False
        return True

    sizes = range(8, 600, 8)
    assert tuple(filter(attends, sizes)) == HEADS
    assert tuple(filter(remembers, sizes)) == DELTA_HEADS
