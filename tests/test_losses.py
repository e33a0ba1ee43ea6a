"""Losses against a plain loop in Python over lists of floats: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grpo_ray.losses.aggregation import AGGREGATIONS, Normalizers
from grpo_ray.losses.kl import KL_ESTIMATORS, kl_loss
from grpo_ray.losses.policy import policy_loss
from grpo_ray.losses.sft import sft_loss

LENGTHS = [3, 1, 5, 2]
MAX_LENGTH = 8
LOW, HIGH = 0.2, 0.28


def batch() -> dict[str, list[list[float]]]:
    g = torch.Generator().manual_seed(4)

    def draw(scale: float, shift: float) -> list[list[float]]:
        return [(torch.randn(n, generator=g, dtype=torch.float64) * scale + shift).tolist() for n in LENGTHS]

    theta, moved = draw(1.0, -3.0), draw(0.8, 0.0)
    old = [[t - m for t, m in zip(a, b, strict=True)] for a, b in zip(theta, moved, strict=True)]
    return {"theta": theta, "old": old, "rollout": draw(1.0, -3.0), "ref": draw(1.0, -3.0)}


ADVANTAGES = [1.3, -0.7, -2.0, 0.0]


def naive_policy(theta: list[list[float]], old: list[list[float]], kind: str) -> float:
    sums = []
    for t, o, adv in zip(theta, old, ADVANTAGES, strict=True):
        total = 0.0
        for x, y in zip(t, o, strict=True):
            r = math.exp(x - y)
            total += -min(r * adv, min(max(r, 1 - LOW), 1 + HIGH) * adv)
        sums.append(total)
    if kind == "grpo":
        return sum(s / len(t) for s, t in zip(sums, theta, strict=True)) / len(sums)
    if kind == "dr_grpo":
        return sum(sums) / (len(sums) * MAX_LENGTH)
    return sum(sums) / sum(len(t) for t in theta)


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def weights(kind: str) -> Tensor:
    n = Normalizers(num_sequences=len(LENGTHS), num_tokens=sum(LENGTHS), max_completion_length=MAX_LENGTH)
    return torch.tensor(
        [AGGREGATIONS[kind](length, n) for length in LENGTHS for _ in range(length)], dtype=torch.float64
    )


def per_token_advantages() -> Tensor:
    return torch.tensor([a for a, n in zip(ADVANTAGES, LENGTHS, strict=True) for _ in range(n)], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_policy_loss_and_gradient_equal_the_plain_loop(kind: str) -> None:
    b = batch()
    theta = flat(b["theta"]).requires_grad_()
    loss, _ = policy_loss(
        theta, flat(b["old"]), flat(b["rollout"]), per_token_advantages(), weights(kind), clip_low=LOW, clip_high=HIGH
    )
    assert loss.item() == pytest.approx(naive_policy(b["theta"], b["old"], kind), abs=1e-9)
    (grad,) = torch.autograd.grad(loss, theta)
    h, k = 1e-6, 0
    for i, row in enumerate(b["theta"]):
        for j in range(len(row)):
            up, down = ([list(r) for r in b["theta"]] for _ in range(2))
            up[i][j] += h
            down[i][j] -= h
            slope = (naive_policy(up, b["old"], kind) - naive_policy(down, b["old"], kind)) / (2 * h)
            assert grad[k].item() == pytest.approx(slope, abs=1e-6)
            k += 1


def test_statistics_count_what_the_bounds_cut_off() -> None:
    b = batch()
    old, rollout, advantages = flat(b["old"]), flat(b["rollout"]), per_token_advantages()
    _, stats = policy_loss(flat(b["theta"]), old, rollout, advantages, weights("dapo"), clip_low=LOW, clip_high=HIGH)
    ratios = [math.exp(x - y) for x, y in zip(flat(b["theta"]).tolist(), old.tolist(), strict=True)]
    pairs = list(zip(ratios, advantages.tolist(), strict=True))
    low, high = sum(r < 1 - LOW and a < 0 for r, a in pairs), sum(r > 1 + HIGH and a > 0 for r, a in pairs)
    assert low > 0
    assert high > 0
    assert (stats.clip_low.item(), stats.clip_high.item()) == (low, high)
    assert stats.ratio.item() == pytest.approx(sum(ratios))
    assert stats.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))
    gaps = [abs(x - y) for x, y in zip(rollout.tolist(), old.tolist(), strict=True)]
    assert stats.mismatch_abs.item() == pytest.approx(sum(gaps))
    assert stats.mismatch_max.item() == pytest.approx(max(gaps))


def test_a_clipped_token_has_no_gradient() -> None:
    theta = torch.tensor([0.5, -0.5, 0.0], requires_grad=True)
    zeros, ones = torch.zeros(3), torch.ones(3)
    loss, _ = policy_loss(theta, zeros, zeros, torch.tensor([1.0, -1.0, 1.0]), ones, clip_low=0.2, clip_high=0.2)
    assert torch.autograd.grad(loss, theta)[0].tolist() == [0.0, 0.0, -1.0]


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_the_sum_over_any_split_is_the_whole(kind: str) -> None:
    b = batch()
    whole_args = (flat(b["theta"]), flat(b["old"]), flat(b["rollout"]), per_token_advantages(), weights(kind))
    whole, _ = policy_loss(*whole_args, clip_low=LOW, clip_high=HIGH)
    for cut in (1, 4, 10):
        parts = [
            policy_loss(*(x[s] for x in whole_args), clip_low=LOW, clip_high=HIGH)[0]
            for s in (slice(cut), slice(cut, None))
        ]
        assert sum(p.item() for p in parts) == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("kind", list(KL_ESTIMATORS))
def test_kl_equals_the_plain_loop(kind: str) -> None:
    b = batch()
    theta, w = flat(b["theta"]).requires_grad_(), weights("grpo")
    loss, total = kl_loss(theta, flat(b["ref"]), w, estimator=kind)
    values, slopes = [], []
    for t, r in zip(flat(b["theta"]).tolist(), flat(b["ref"]).tolist(), strict=True):
        d = t - r
        value, slope = {"k1": (d, 1.0), "k2": (d * d / 2, d), "k3": (math.exp(-d) + d - 1, 1 - math.exp(-d))}[kind]
        values.append(value)
        slopes.append(slope)
    assert loss.item() == pytest.approx(sum(a * v for a, v in zip(w.tolist(), values, strict=True)))
    assert total.item() == pytest.approx(sum(values))
    (grad,) = torch.autograd.grad(loss, theta)
    assert grad.tolist() == pytest.approx([a * s for a, s in zip(w.tolist(), slopes, strict=True)])


def test_sft_is_the_mean_cross_entropy_of_all_completion_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(sum(LENGTHS), 9, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 9, (sum(LENGTHS),), generator=g)
    logp = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    got = sft_loss(logp, weights("dapo"))
    assert got.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-12)
