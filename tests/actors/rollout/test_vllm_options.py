"""The options of an engine that need no engine to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actors.rollout.vllm_options import (
    engine_args,
    rollout_env,
    speculative_config,
    tokens_at_once_on_cpu,
    tokens_at_once_on_gpu,
)
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("gpu_gb", "options", "expected"),
    [
        (141, {}, 16384),
        (80, {}, 16384),
        (48, {}, 8192),
        (24, {"max_num_seqs": 9000}, 9000),
        (141, {"max_num_batched_tokens": 4096}, 4096),
    ],
)
def test_a_step_of_an_engine_is_as_large_as_its_gpu_allows(gpu_gb: int, options: dict[str, Any], expected: int) -> None:
    assert tokens_at_once_on_gpu(RolloutConfig(**options), gpu_gb << 30) == expected


def test_a_step_on_a_cpu_holds_the_longest_sample() -> None:
    assert tokens_at_once_on_cpu(RolloutConfig(), 512) == 2048
    assert tokens_at_once_on_cpu(RolloutConfig(), 4096) == 4096
    assert tokens_at_once_on_cpu(RolloutConfig(max_num_batched_tokens=600), 512) == 600
    with pytest.raises(ConfigError, match=r"rollout\.max_num_batched_tokens is 600.*raise it to 601 at least"):
        tokens_at_once_on_cpu(RolloutConfig(max_num_batched_tokens=600), 601)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        ({}, {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}),
        ({"model": "draft", "num_tokens": 5}, {"method": "draft_model", "num_speculative_tokens": 5, "model": "draft"}),
        ({"model": "h", "method": "eagle3"}, {"method": "eagle3", "num_speculative_tokens": 3, "model": "h"}),
    ],
)
def test_a_draft_is_told_in_vllms_words(asked: dict[str, Any] | None, expected: dict[str, Any] | None) -> None:
    assert speculative_config(RolloutConfig.model_validate({"speculative": asked})) == expected


def test_an_engine_on_a_gpu_imports_no_flashinfer_unless_its_recipe_says_so() -> None:
    name = "VLLM_USE_FLASHINFER_SAMPLER"
    assert rollout_env(RolloutConfig(), on_gpu=True, backend="nccl")[name] == "0"
    assert name not in rollout_env(RolloutConfig(), on_gpu=False, backend="gloo")
    assert rollout_env(RolloutConfig(env={name: "1"}), on_gpu=True, backend="nccl")[name] == "1"


@pytest.mark.parametrize("multimodal", [False, True])
def test_an_engine_of_more_than_a_language_model_loads_the_language_model_alone(
    tiny_model: Path, multimodal: bool
) -> None:
    args = engine_args(
        RolloutConfig(), str(tiny_model), "float32", 128, 1, "gloo", trust_remote_code=False, multimodal=multimodal
    )
    assert args.language_model_only is multimodal
