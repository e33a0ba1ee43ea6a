"""The critic's values and what is made of them, over packed sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo_ray.algorithm.advantages import gae_of_segments
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.batch.segments import Segments
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.value import ValueModel

LENGTHS = [3, 1, 5]
BETA = 0.1


def plain_gae(
    reward: float, kl: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """PPO's definition, from the end: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lambda A_{t+1}."""
    advantages = [0.0] * len(values)
    following = 0.0
    for t in reversed(range(len(values))):
        reward_t = (reward if t == len(values) - 1 else 0.0) - BETA * kl[t]
        next_value = values[t + 1] if t + 1 < len(values) else 0.0
        following = reward_t + gamma * next_value - values[t] + gamma * lam * following
        advantages[t] = following
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


@pytest.mark.parametrize("in_reward", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.95), (1.0, 0.0)])
def test_packed_sequences_get_the_gae_of_each_alone(gamma: float, lam: float, in_reward: bool) -> None:
    values = torch.from_numpy(np.random.default_rng(1).normal(size=sum(LENGTHS)))
    rewards = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)
    segments = Segments.of(torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS)))
    kl = torch.from_numpy(np.random.default_rng(2).normal(size=sum(LENGTHS)))
    advantages, returns = gae_of_segments(
        rewards, kl if in_reward else None, values, segments, beta=BETA, gamma=gamma, lam=lam
    )
    kls = (kl if in_reward else torch.zeros_like(kl)).split(LENGTHS)
    rows = zip(rewards.tolist(), kls, values.split(LENGTHS), strict=True)
    want = [plain_gae(r, k.tolist(), v.tolist(), gamma, lam) for r, k, v in rows]
    assert advantages.tolist() == pytest.approx([x for a, _ in want for x in a], rel=1e-12)
    assert returns.tolist() == pytest.approx([x for _, r in want for x in r], rel=1e-12)


def test_values_start_at_zero_and_see_only_the_text_before_the_token(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    attention = choose_attention("sdpa", torch.device("cpu"))
    hf: Any = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention)
    model = ValueModel(hf)

    def item(completion: list[int], sample: int) -> PackItem:
        zeros = np.zeros(len(completion), np.float32)
        return PackItem(np.array([10, 11, 12]), np.array(completion), zeros, 0.0, 1.0, sample)

    with torch.no_grad():
        assert model(pack([item([20, 21, 22], 0)])).tolist() == [0.0, 0.0, 0.0]
        torch.nn.init.normal_(model.head.weight)
        alone = model(pack([item([20, 21, 22], 0)]))
        other = model(pack([item([20, 21, 99], 0), item([50, 51], 1)]))
    torch.testing.assert_close(other[:3], alone, rtol=1e-6, atol=1e-6)
    assert len(set(alone.tolist())) == 3
