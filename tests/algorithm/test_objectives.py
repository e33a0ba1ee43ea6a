"""The whole way from samples to a gradient of the model's weights, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.presets import PRESETS
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.policy import PolicyModel

LENGTHS = [3, 17, 1, 9, 24, 6]
TEMPERATURE = 0.9


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PolicyModel:
    from transformers import AutoModelForCausalLM

    implementation = choose_attention("sdpa", torch.device("cpu"))
    hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=implementation)
    return PolicyModel(hf, chunk=16)


def items(objective: GrpoObjective) -> list[PackItem]:
    rng = np.random.default_rng(0)
    n = Normalizers(num_sequences=len(LENGTHS), num_tokens=sum(LENGTHS), max_completion_length=30)
    return [
        PackItem(
            prompt_ids=rng.integers(8, 200, 4),
            completion_ids=rng.integers(8, 200, length),
            rollout_logprobs=rng.normal(-5.2, 0.2, length).astype(np.float32),
            advantage=float(rng.normal()),
            weight=objective.weight(length, n),
            sample=i,
        )
        for i, length in enumerate(LENGTHS)
    ]


def weights_gradient(policy: PolicyModel, config: AlgorithmConfig, split: list[list[int]]) -> tuple[Tensor, float]:
    """Over the micro-batches of the split, one backward pass each, as the learner does it."""
    objective = GrpoObjective(config)
    every = items(objective)
    policy.zero_grad()
    total = 0.0
    for members in split:
        data = MicroBatchData.of(pack([every[i] for i in members]), torch.device("cpu"))
        theta, entropy = policy(data.packed, TEMPERATURE)
        if config.old_logprobs == "recompute":
            data.old_logps_C = theta.detach() - 0.3 * torch.sin(torch.from_numpy(data.packed.targets).float())
        data.ref_logps_C = theta.detach() - 0.2 * torch.cos(torch.from_numpy(data.packed.targets).float())
        loss, *_ = objective.loss(data, theta, entropy)
        loss.backward()
        total += loss.item()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]), total


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_presets_gradient_is_the_same_for_any_packing(preset: str, policy: PolicyModel) -> None:
    extra: dict[str, Any] = {"entropy_coef": 0.01, "beta": 0.05}
    config = AlgorithmConfig(preset=preset, **extra)
    whole, loss = weights_gradient(policy, config, [[0, 1, 2, 3, 4, 5]])
    assert whole.norm() > 0
    for split in ([[0, 1, 2], [3, 4, 5], []], [[4], [5, 0], [2], [1, 3]]):
        parts, again = weights_gradient(policy, config, split)
        assert again == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert (parts - whole).norm() < 1e-4 * whole.norm()


def test_means_over_no_tokens_are_left_out_instead_of_zero() -> None:
    objective = GrpoObjective(AlgorithmConfig())
    assert objective.metrics(dict.fromkeys(objective.sum_names, 0.0), 0.0, 1) == {"loss/policy": 0.0}
