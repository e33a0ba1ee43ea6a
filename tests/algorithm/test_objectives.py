"""The whole way from samples to a gradient of the model's weights, without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData, SftObjective
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


def items(objective: GrpoObjective | SftObjective) -> list[PackItem]:
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


BY_TOKEN = {"grpo", "dr_grpo", "dapo", "cispo", "sapo"}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "token_truncate": {"importance_sampling": "token_truncate"},
    "token_mask": {"importance_sampling": "token_mask"},
    "sequence_truncate": {"importance_sampling": "sequence_truncate"},
    "geometric_mask": {"geometric_mask": (0.9, 1.1)},
    "off_policy_mask": {"off_policy_mask_threshold": 0.1},
    "entropy": {"entropy_coef": 0.01},
}
OF_TOKENS = {"none", "token_truncate", "token_mask"}
CASES = [(each, c) for each in POLICY_LOSSES for c in CORRECTIONS if each in BY_TOKEN or not c.startswith("token")]


@pytest.mark.parametrize("kl", ["no KL", "KL"])
@pytest.mark.parametrize("old", ["of this pass", "other"])
@pytest.mark.parametrize(("loss", "correction"), CASES)
def test_the_slopes_of_some_tokens_are_the_derivatives_of_the_whole_loss(
    loss: str, correction: str, old: str, kl: str
) -> None:
    config = AlgorithmConfig(loss=loss, beta=0.05 if kl == "KL" else 0.0, **CORRECTIONS[correction])
    objective = GrpoObjective(config)
    data = MicroBatchData.of(pack(items(objective)), torch.device("cpu"))
    g = torch.Generator().manual_seed(7)
    logps = (data.rollout_logps_C + 0.4 * torch.randn(sum(LENGTHS), generator=g)).requires_grad_()
    data.ref_logps_C = logps.detach() + 0.3 * torch.randn(sum(LENGTHS), generator=g)
    if old == "other":
        data.old_logps_C = logps.detach() + 0.3 * torch.randn(sum(LENGTHS), generator=g)
    slopes = objective.slopes(data)
    if loss not in BY_TOKEN or correction not in OF_TOKENS:
        assert slopes is None
        return
    assert slopes is not None
    got = torch.cat([slopes(rows, logps.detach()[rows]) for rows in (slice(0, 13), slice(13, 48), slice(48, 60))])
    (want,) = torch.autograd.grad(objective.loss(data, logps, torch.zeros_like(logps))[0], logps)
    assert want.norm() > 0
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_the_slopes_of_supervised_training_are_the_derivatives_of_its_loss() -> None:
    objective = SftObjective()
    data = MicroBatchData.of(pack(items(objective)), torch.device("cpu"))
    logps = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(7)).requires_grad_()
    (want,) = torch.autograd.grad(objective.loss(data, logps, torch.zeros_like(logps))[0], logps)
    slopes = objective.slopes(data)
    assert slopes is not None
    assert torch.equal(slopes(slice(5, 20), logps.detach()[5:20]), want[5:20])


def test_means_over_no_tokens_are_left_out_instead_of_zero() -> None:
    objective = GrpoObjective(AlgorithmConfig())
    assert objective.metrics(dict.fromkeys(objective.sum_names, 0.0), 0.0, 1) == {"loss/policy": 0.0}
