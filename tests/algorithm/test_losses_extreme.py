"""Log-ratios that exp() can't hold, in fp32: everything stays finite, and gradients are the formulas' limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.bounds import LOG_RATIO_BOUND
from grpo_ray.algorithm.losses.correction import IMPORTANCE_SAMPLING, CorrectionOptions, correction_weights
from grpo_ray.algorithm.losses.dpo import dpo_loss, ipo_loss
from grpo_ray.algorithm.losses.kl import KL_ESTIMATORS, kl_loss, kl_of_tokens
from grpo_ray.algorithm.losses.reward_model import bradley_terry_loss, point_loss
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.algorithm.losses.value import value_loss
from grpo_ray.batch.segments import Segments
from grpo_ray.config.supervised import RewardModelOptions
from tests.naive_losses import MAX_LENGTH, OPTIONS, Batch
from tests.packed import algorithm, run

GAPS = [-1000.0, -88.8, -88.7, -20.5, -20.0, -1.0, 0.0, 1.0, 20.0, 20.5, 88.7, 88.8, 1000.0]
LOSSES = list(POLICY_LOSSES)


def batch(theta: Tensor, old: Tensor, advantage: float) -> Batch:
    """One sequence, in fp32."""
    zeros = torch.zeros_like(old)
    return Batch([theta.requires_grad_()], [old], [old], [old], [zeros.requires_grad_()], [advantage])


def exp(x: float) -> float:
    return math.exp(min(max(x, -100.0), 100.0))


def slope(kind: str, x: float, advantage: float, dual_clip_c: float | None = None) -> float:
    """d loss / d theta of a sequence of one token by the papers' formulas, and 0 where the ratio is beyond the bound."""
    o, r = OPTIONS, exp(x)
    if kind == "cispo":
        return -min(r, o.cispo_max_ratio) * advantage
    if kind == "sapo":
        tau = o.sapo_temperature_pos if advantage > 0 else o.sapo_temperature_neg
        gate = 1 / (1 + math.exp(-min(tau * (r - 1), 500.0)))
        return -4 * gate * (1 - gate) * r * advantage
    low, high = (-o.epsilon_low, o.epsilon_high)
    if kind != "gmpo":
        low, high = math.log(1 + low), math.log(1 + high)
    cut = x > high if advantage > 0 else x < low
    if dual_clip_c is not None and advantage < 0:
        cut |= r > dual_clip_c
    return 0.0 if cut or abs(x) > LOG_RATIO_BOUND else -r * advantage


def check(kind: str, x: float, advantage: float, **values: Any) -> None:
    old = torch.tensor([-3.0])
    b = batch(old + x, old, advantage)
    loss, metrics = run(algorithm(kind, **values), b)
    (got,) = torch.autograd.grad(loss, b.theta)
    assert loss.isfinite()
    assert all(map(math.isfinite, metrics.values())), metrics
    share = MAX_LENGTH if kind == "dr_grpo" else 1
    want = slope(kind, x, advantage, values.get("dual_clip_c")) / share
    assert got.item() == pytest.approx(want, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_every_loss_has_its_formulas_gradient_however_far_the_policy_moved(kind: str, advantage: float) -> None:
    for x in GAPS:
        check(kind, x, advantage)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
def test_dual_clip_cuts_off_what_exp_can_not_hold(kind: str) -> None:
    for x in GAPS:
        check(kind, x, -1.0, dual_clip_c=3.0)


@pytest.mark.parametrize("kind", [k for k in LOSSES if k != "cispo"])
def test_a_token_that_became_impossible_leaves_no_nan(kind: str) -> None:
    """cispo's loss is a log-probability itself."""
    b = batch(torch.tensor([-math.inf, -2.0]), torch.tensor([-3.0, -2.0]), 1.0)
    loss, _ = run(algorithm(kind), b)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, b.theta)[0].isfinite().all()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_small_drift_of_a_long_answer_does_not_end_a_run(kind: str, advantage: float) -> None:
    """0.0054 nats a token is a ratio of e^88.5 over 16,384 of them, the 16 mini-batches of a step further it is infinite."""
    old = torch.full((16_384,), -1.0)
    for drift in (0.0054, 0.0055, 0.02, -0.02):
        b = batch(old + drift, old, advantage)
        loss, metrics = run(algorithm(kind), b)
        (got,) = torch.autograd.grad(loss, b.theta)
        assert loss.isfinite()
        assert got.isfinite().all()
        assert all(map(math.isfinite, metrics.values()))
        if kind == "grpo_sequence":
            assert not got.any()
        if kind == "gspo":
            clipped = drift > OPTIONS.epsilon_high if advantage > 0 else drift < -OPTIONS.epsilon_low
            want = 0.0 if clipped else -math.exp(drift) * advantage / len(old)
            torch.testing.assert_close(got, torch.full_like(old, want), rtol=1e-3, atol=0)


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
def test_kl_estimators_stay_finite(estimator: str) -> None:
    for d in GAPS:
        for x in GAPS:
            old = torch.tensor([-3.0])
            theta = (old + x).requires_grad_()
            loss, total = kl_loss(theta, theta.detach() - d, old, torch.ones(1), estimator=estimator)
            (got,) = torch.autograd.grad(loss, theta)
            assert loss.isfinite()
            assert total.isfinite()
            assert got.isfinite()
            k3, slope_k3 = (exp(-d) + d - 1, 1 - exp(-d)) if d >= -LOG_RATIO_BOUND else (exp(20) - 21, 0.0)
            r = exp(max(-20.0, min(x, 20.0)))
            moved = r if abs(x) <= LOG_RATIO_BOUND else 0.0
            want = {"k1": 1.0, "k2": d, "k3": slope_k3, "k3+": d, "k3_unbiased": r * slope_k3 + moved * k3}[estimator]
            assert got.item() == pytest.approx(want, rel=1e-4, abs=1e-6 * max(1.0, r, r * k3))
        if estimator in ("k1", "k2", "k3"):
            assert kl_of_tokens(torch.tensor([-3.0]), torch.tensor([-3.0 - d]), estimator=estimator).isfinite()


@pytest.mark.parametrize("kind", [None, *IMPORTANCE_SAMPLING])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_weight_of_a_token_is_a_number_however_far_the_sampler_was(kind: str | None, advantage: float) -> None:
    options = CorrectionOptions(kind, 0.0, 2.0, None if kind else (0.99, 1.01), 0.5)
    segments = Segments.of(torch.zeros(3, dtype=torch.int64))
    for gap in GAPS:
        rollout, a = torch.full((3,), -3.0), torch.full((3,), advantage)
        old = rollout + torch.tensor([gap, 0.0, 0.0])
        weights = correction_weights(old, old, rollout, a, segments, options)
        assert weights.isfinite().all()
        assert (weights <= 2).all()
        far = gap > math.log(2) or (kind is None and gap < -0.1)
        if kind in ("token_mask", "sequence_mask", None) and far:
            assert weights[0] == 0
    for loss in LOSSES:
        if kind is None or kind.startswith("sequence") or loss not in ("grpo_sequence", "gspo", "gmpo"):
            check(loss, 1000.0, 1.0, **({"importance_sampling": kind} if kind else {}))


@pytest.mark.parametrize("gap", [*GAPS, 1e6, -1e6])
def test_losses_of_pairs_scores_and_values_stay_finite(gap: float) -> None:
    for loss_of in (
        lambda x: dpo_loss(x, torch.zeros(1), torch.ones(1), beta=0.1),
        lambda x: ipo_loss(x, torch.zeros(1), torch.ones(1), beta=0.1),
        lambda x: bradley_terry_loss(x, torch.zeros(1), torch.zeros(1), torch.ones(1)),
        lambda x: point_loss(x, torch.ones(1), torch.ones(1), kind=RewardModelOptions(loss="bce").loss),
        lambda x: point_loss(x, torch.ones(1), torch.ones(1), kind="mse"),
        lambda x: value_loss(x, torch.zeros(1), torch.ones(1), torch.ones(1), clip_range=0.5),
    ):
        x = torch.tensor([gap], requires_grad=True)
        loss = loss_of(x)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, x)[0].isfinite().all()
