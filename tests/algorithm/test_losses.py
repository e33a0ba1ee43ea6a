"""Every objective, correction and KL against the plain loops of `naive_losses.py`: values and gradients, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo_ray.algorithm.advantages import ADVANTAGES, group_advantages
from grpo_ray.algorithm.losses.aggregation import (
    Normalizers,
    fixed_length,
    sequence_mean,
    sequence_sum,
    token_mean,
    weights_of_sequences,
)
from grpo_ray.algorithm.losses.correction import IMPORTANCE_SAMPLING
from grpo_ray.algorithm.losses.kl import KL_ESTIMATORS, kl_of_tokens
from grpo_ray.algorithm.losses.policy import PolicyInputs
from grpo_ray.algorithm.losses.sft import sft_loss
from grpo_ray.algorithm.losses.table import POLICY_LOSSES
from grpo_ray.algorithm.losses.value import value_loss
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import pack
from grpo_ray.batch.segments import Segments
from grpo_ray.config import algorithm as schema
from grpo_ray.config.algorithm import AlgorithmConfig
from tests.naive_losses import OPTIONS, SEQUENCE, Batch, correction, kl_tokens, make_batch, number, policy_loss, reduce
from tests.packed import algorithm, gradient, run

LOSSES = list(POLICY_LOSSES)
SEEDS = range(12)


def assert_same(got: Tensor, want: Tensor, b: Batch) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gradient(got, b), gradient(want, b), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_loss_and_its_gradient_are_the_papers(kind: str, seed: int) -> None:
    b = make_batch(seed)
    got, metrics = run(algorithm(kind), b)
    want = policy_loss(kind, b, OPTIONS)
    assert_same(got, want, b)
    assert metrics["loss/policy"] == pytest.approx(want.item(), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_dual_clip_bounds_the_loss_of_bad_samples(kind: str, seed: int) -> None:
    b = make_batch(seed, drift=1.5)
    got, _ = run(algorithm(kind, dual_clip_c=2.0), b)
    want = policy_loss(kind, b, replace(OPTIONS, dual_clip_c=2.0))
    assert_same(got, want, b)
    plain, _ = run(algorithm(kind), b)
    assert got.item() <= plain.item()


def clips(kind: str, log_ratios: Sequence[float], advantages: Sequence[float], **options: float) -> list[list[bool]]:
    """Of sequences of one token each: which are cut off below, and which above."""
    of_token = torch.tensor([log_ratios, advantages], dtype=torch.float64)
    x = PolicyInputs(
        of_token[0], torch.zeros_like(of_token[0]), of_token[1], Segments.of(torch.arange(len(log_ratios)))
    )
    got = POLICY_LOSSES[kind].token_loss(x, replace(OPTIONS, **options))
    return [got.clip_low_N.tolist(), got.clip_high_N.tolist()]


SIDES = {"sapo": (False, False), "cispo": (False, True)}


@pytest.mark.parametrize("kind", LOSSES)
def test_what_is_cut_off_has_the_sign_of_its_advantage_whatever_its_size(kind: str) -> None:
    pairs = [(d, a) for d in (-1.0, 0.0, 1.0) for a in (-0.5, 0.0, 0.5)]
    low, high = SIDES.get(kind, (True, True))
    assert clips(kind, *zip(*pairs, strict=True)) == [
        [low and d < 0 and a < 0 for d, a in pairs],
        [high and d > 0 and a > 0 for d, a in pairs],
    ]


@pytest.mark.parametrize("kind", LOSSES)
def test_a_ratio_at_its_bound_is_not_cut_off(kind: str) -> None:
    least, most = torch.tensor([-0.2, 0.2], dtype=torch.float64).exp().tolist()
    bounds = {"epsilon_low": 1 - least, "epsilon_high": most - 1, "cispo_max_ratio": most}
    if kind == "gmpo":  # Bounds the logarithm.
        bounds = {"epsilon_low": 0.2, "epsilon_high": 0.2}
    assert clips(kind, [-0.2, 0.2], [-1.0, 1.0], **bounds) == [[False] * 2] * 2


CORRECTIONS: dict[str, dict[str, Any]] = {
    "tis": {"importance_sampling": "token_truncate"},
    "icepop": {"importance_sampling": "token_mask"},
    "sequence_truncate": {"importance_sampling": "sequence_truncate"},
    "sequence_mask": {"importance_sampling": "sequence_mask"},
    "geometric": {"geometric_mask": [0.8, 1.25]},
    "off_policy": {"off_policy_mask_threshold": 0.05},
    "several": {
        "importance_sampling": "sequence_truncate",
        "importance_sampling_clip_min": 0.5,
        "importance_sampling_clip_max": 1.5,
        "geometric_mask": [0.7, 1.4],
        "off_policy_mask_threshold": 0.1,
    },
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in LOSSES
        for name in CORRECTIONS
        if not (kind in SEQUENCE and CORRECTIONS[name].get("importance_sampling", "").startswith("token"))
    ],
)
def test_corrections_weigh_the_policy_loss_without_a_gradient_of_their_own(kind: str, name: str) -> None:
    values = CORRECTIONS[name]
    masked = 0
    for seed in SEEDS:
        b = make_batch(seed)
        config = algorithm(kind, **values)
        weights = correction(
            b,
            config.importance_sampling,
            config.importance_sampling_clip_min,
            config.importance_sampling_clip_max,
            config.geometric_mask,
            config.off_policy_mask_threshold,
        )
        got, metrics = run(config, b)
        assert_same(got, policy_loss(kind, b, OPTIONS, weights), b)
        w = torch.cat(weights)
        masked += int((w == 0).sum())
        assert metrics["correction/mean_weight"] == pytest.approx(w.mean().item())
        assert metrics["correction/ess"] == pytest.approx(
            (w.sum() ** 2 / (len(w) * w.square().sum().clamp(1e-9))).item()
        )
        assert metrics["correction/masked_tokens"] == pytest.approx((w == 0).double().mean().item())
        assert metrics["correction/masked_sequences"] == pytest.approx(
            sum(not row.any() for row in weights) / len(weights)
        )
    assert (masked > 0) == (name not in ("tis", "sequence_truncate"))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3_unbiased"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_kl_is_added_to_the_loss(kind: str, estimator: str) -> None:
    for seed in SEEDS:
        b = make_batch(seed)
        got, metrics = run(algorithm(kind, beta=0.3, kl_estimator=estimator), b)
        tokens = kl_tokens(estimator, b)
        kl = reduce(kind, tokens)
        assert_same(got, policy_loss(kind, b, OPTIONS) + 0.3 * kl, b)
        assert metrics["loss/kl"] == pytest.approx(0.3 * kl.item())
        assert metrics["kl/ref"] == pytest.approx(sum(x.item() for row in tokens for x in row) / sum(b.lengths))


def test_k3_plus_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    b = make_batch(3)
    losses = {e: run(algorithm("grpo", beta=0.3, kl_estimator=e), b)[0] for e in ("k2", "k3", "k3+")}
    torch.testing.assert_close(losses["k3+"], losses["k3"], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(losses["k3+"], b), gradient(losses["k2"], b), rtol=1e-12, atol=0)
    assert (gradient(losses["k3"], b) - gradient(losses["k2"], b)).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", list(KL_ESTIMATORS))
def test_which_estimators_have_the_gradient_of_the_divergence(estimator: str) -> None:
    """Over all tokens of a small vocabulary, so that the expectation is exact."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    theta = logits.log_softmax(-1)
    ref, other = (torch.randn(5, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    (true,) = torch.autograd.grad((theta.exp() * (theta - ref)).sum(), logits, retain_graph=True)

    def right(old: Tensor) -> bool:
        """Samples are from `old`; an estimator without r takes them for samples of theta."""
        value = (old.exp() * KL_ESTIMATORS[estimator](theta - ref, theta - old)).sum()
        (got,) = torch.autograd.grad(value, logits, retain_graph=True)
        return torch.allclose(got, true, atol=1e-9)

    assert right(theta.detach()) == (estimator in ("k2", "k3+", "k3_unbiased"))
    assert right(other) == (estimator == "k3_unbiased")


@pytest.mark.parametrize("kind", LOSSES)
def test_the_entropy_bonus_has_the_weights_of_the_loss(kind: str) -> None:
    b = make_batch(5)
    got, metrics = run(algorithm(kind, entropy_coef=0.02), b)
    bonus = reduce(kind, [list(row) for row in b.entropy])
    assert_same(got, policy_loss(kind, b, OPTIONS) - 0.02 * bonus, b)
    assert metrics["loss/entropy"] == pytest.approx(-0.02 * bonus.item())


EVERYTHING: dict[str, Any] = {
    "beta": 0.1,
    "kl_estimator": "k3_unbiased",
    "entropy_coef": 0.01,
    "importance_sampling": "sequence_truncate",
    "geometric_mask": [0.7, 1.4],
    "off_policy_mask_threshold": 0.1,
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    "split", [[[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [4, 2, 1]], [[0], [1], [2], [3], [4], [5]], [[5, 4, 3, 2, 1, 0]]]
)
def test_the_loss_is_the_same_for_any_split_into_micro_batches(kind: str, split: list[list[int]]) -> None:
    for values in ({}, EVERYTHING):
        b = make_batch(7)
        whole, metrics = run(algorithm(kind, **values), b)
        parts, again = run(algorithm(kind, **values), b, split)
        assert_same(parts, whole, b)
        assert again == pytest.approx(metrics, rel=1e-9)


@pytest.mark.parametrize("kind", LOSSES)
def test_without_advantages_there_is_no_gradient(kind: str) -> None:
    b = replace(make_batch(2), advantages=[0.0] * 6)
    loss, _ = run(algorithm(kind), b)
    assert loss.item() == 0
    assert not gradient(loss, b).any()


@pytest.mark.parametrize("kind", LOSSES)
def test_before_the_first_update_the_gradient_is_reinforces(kind: str) -> None:
    """theta = old: every ratio is 1, whatever becomes of it later; only the normalizers differ."""
    b = make_batch(4)
    b = replace(b, old=[t.detach() for t in b.theta])
    loss, metrics = run(algorithm(kind), b)
    rows = [[-a * x for x in t] for t, a in zip(b.theta, b.advantages, strict=True)]
    torch.testing.assert_close(gradient(loss, b), gradient(reduce(kind, rows), b), rtol=1e-9, atol=1e-12)
    assert metrics["ratio/mean"] == pytest.approx(1.0)
    assert metrics["clip/low"] == metrics["clip/high"] == metrics["kl/old"] == 0


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_micro_batch_adds_nothing(kind: str) -> None:
    """What keeps a rank in step with the others; its one token is of no sample."""
    objective = GrpoObjective(algorithm(kind, **EVERYTHING))
    data = MicroBatchData.of(pack([]), torch.device("cpu"))
    data.ref_logps_C = torch.tensor([-9.0])
    theta, entropy = torch.tensor([-7.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    loss, sums, _ = objective.loss(data, theta, entropy)
    assert loss.item() == 0
    assert sums.isfinite().all()
    assert all(not g.any() for g in torch.autograd.grad(loss, (theta, entropy)))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("advantage", list(ADVANTAGES))
def test_rewards_that_are_all_equal_move_nothing(kind: str, advantage: str) -> None:
    b = make_batch(8)
    rewards = torch.full((2, 3), 0.7, dtype=torch.float64)
    equal = group_advantages(rewards, kind=advantage, ddof=1, eps=0.0)
    loss, _ = run(algorithm(kind), replace(b, advantages=equal.flatten().tolist()))
    assert not gradient(loss, b).any()


def test_a_clipped_token_has_no_gradient_and_is_counted() -> None:
    ratios = torch.tensor([math.e, 1 / math.e, 1.0, math.e, 1 / math.e], dtype=torch.float64)
    signs = [1.0, -1.0, 1.0, -1.0, 1.0]
    one = [torch.zeros(1, dtype=torch.float64) for _ in signs]
    theta = [r.log().reshape(1).requires_grad_() for r in ratios]
    b = Batch(theta, one, one, one, [x.clone().requires_grad_() for x in one], signs)
    loss, metrics = run(algorithm("dapo"), b)
    want = torch.tensor([0, 0, -1, math.e, -1 / math.e], dtype=torch.float64) / 5
    torch.testing.assert_close(gradient(loss, b)[:5], want)
    assert (metrics["clip/low"], metrics["clip/high"]) == (0.2, 0.2)


def test_the_mismatch_is_between_rollout_and_old() -> None:
    b = make_batch(9)
    _, metrics = run(algorithm("grpo"), b)
    gaps = [p - q for p, q in zip(torch.cat(b.old).tolist(), torch.cat(b.rollout).tolist(), strict=True)]
    assert metrics["mismatch/mean_abs"] == pytest.approx(sum(map(abs, gaps)) / len(gaps))
    assert metrics["mismatch/max_abs"] == pytest.approx(max(map(abs, gaps)))
    assert metrics["mismatch/kl"] == pytest.approx(sum(math.exp(x) - 1 - x for x in gaps) / len(gaps))
    ratios = [math.exp(t - p) for t, p in zip(torch.cat(b.theta).tolist(), torch.cat(b.old).tolist(), strict=True)]
    assert metrics["kl/old"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / len(ratios))


def test_old_can_be_the_samplers_own_report() -> None:
    b = make_batch(6)
    got, metrics = run(algorithm("dapo", old_logprobs="rollout"), b)
    assert_same(got, policy_loss("dapo", replace(b, old=b.rollout), OPTIONS), b)
    gaps = (torch.cat(b.theta) - torch.cat(b.rollout)).abs()
    assert metrics["mismatch/mean_abs"] == pytest.approx(gaps.mean().item())


def test_the_table_and_the_schema_know_the_same_names() -> None:
    def names(field: str) -> set[Any]:
        annotation = AlgorithmConfig.model_fields[field].annotation
        return {x for arg in get_args(annotation) for x in (get_args(arg) or (arg,))} - {type(None)}

    assert set(schema.ADVANTAGES) == {*ADVANTAGES, *schema.TOKEN_ADVANTAGES}
    assert set(schema.LOSSES) == set(POLICY_LOSSES)
    assert names("kl_estimator") == set(KL_ESTIMATORS)
    assert names("importance_sampling") == set(IMPORTANCE_SAMPLING)


def test_the_values_loss_is_the_worse_of_clipped_and_unclipped() -> None:
    g = torch.Generator().manual_seed(0)
    values, old, returns, weights = (torch.randn(40, generator=g, dtype=torch.float64) for _ in range(4))
    values.requires_grad_()
    got = value_loss(values, old, returns, weights, clip_range=0.3)
    want = number(0.0)
    for v, o, r, w in zip(values, old.tolist(), returns.tolist(), weights.tolist(), strict=True):
        bounded = min(max(v, number(o - 0.3)), number(o + 0.3))
        want = want + w * 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    slopes = [torch.autograd.grad(x, values)[0] for x in (got, want)]
    torch.testing.assert_close(*slopes, rtol=1e-6, atol=1e-12)


def test_sft_is_the_mean_cross_entropy_of_all_completion_tokens() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(11, 9, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 9, (11,), generator=g)
    logp = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    weight = token_mean(5, Normalizers(num_sequences=3, num_tokens=11, max_completion_length=8))
    got = sft_loss(logp, torch.full_like(logp, weight))
    assert got.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_kl_in_the_reward_is_no_part_of_the_loss(estimator: str) -> None:
    b = make_batch(3)
    config = algorithm("dapo", beta=0.3, kl_in="reward", kl_estimator=estimator)
    loss, metrics = run(config, b)
    plain, _ = run(algorithm("dapo"), b)
    assert torch.equal(gradient(loss, b), gradient(plain, b))
    assert loss == plain
    assert not {"loss/kl", "kl/ref"} & metrics.keys()
    got = kl_of_tokens(torch.cat(b.theta), torch.cat(b.ref), estimator=estimator)
    want = kl_tokens(estimator, b)
    assert not got.requires_grad
    assert got.tolist() == pytest.approx([x.item() for row in want for x in row], rel=1e-9)


@pytest.mark.parametrize("weight", [sequence_mean, sequence_sum, fixed_length, token_mean])
def test_the_weights_of_whole_sequences_are_a_mean_over_all_that_the_loss_averages(weight: Any) -> None:
    lengths = np.array([3, 5, 2, 10])
    whole, unit = Normalizers(4, 20, 16), Normalizers.unit(16)
    tokens = np.array([weight(int(length), whole) for length in lengths], np.float32)
    want = lengths / 20 if weight is token_mean else np.full(4, 0.25)
    assert weights_of_sequences(weight, tokens, lengths, unit) == pytest.approx(want)
    in_part = np.array([weight(int(length), unit) for length in lengths], np.float32)
    factor = weight(1, whole) / weight(1, unit)
    assert factor * weights_of_sequences(weight, in_part, lengths, unit) == pytest.approx(want)
