"""Advantages against a plain loop in Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.algorithm.advantages import ADVANTAGES, gae, group_advantages, kl_in_reward, process_advantages
from grpo_ray.spread import differ, has_spread
from grpo_ray.types import Group, Prompt, Score, ScoreStatus

KINDS = list(ADVANTAGES)
Groups = list[list[float]]


def spread(values: list[float], ddof: int) -> float:
    if len(values) <= ddof:
        return 0.0
    mean = statistics.fmean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def naive(groups: Groups, kind: str, ddof: int, eps: float) -> Groups:
    """NaN: no score."""
    scored = [[r for r in g if r == r] for g in groups]
    every = [r for g in scored for r in g]
    centred = [r - statistics.fmean(g) if len(set(g)) > 1 else 0.0 for g in scored for r in g]
    out = []
    for group, known in zip(groups, scored, strict=True):
        row = []
        for r in group:
            if r != r or len(set(known)) < 2:
                row.append(0.0)
                continue
            others = list(known)
            others.remove(r)
            above = r - statistics.fmean(known)
            match kind:
                case "grpo":
                    row.append(above / (spread(known, ddof) + eps))
                case "dr_grpo":
                    row.append(above)
                case "rloo":
                    row.append(r - statistics.fmean(others))
                case "reinforce_pp_baseline":
                    row.append((above - statistics.fmean(centred)) / (spread(centred, ddof) + eps))
                case "batch_std":
                    row.append(above / (spread(every, ddof) + eps))
        out.append(row)
    return out


def advantages(groups: Groups, kind: str, ddof: int = 1, eps: float = 1e-4) -> torch.Tensor:
    rewards = torch.tensor(groups, dtype=torch.float64)
    return group_advantages(rewards, kind=kind, ddof=ddof, eps=eps, mask_PG=~rewards.isnan())


@pytest.mark.parametrize(
    ("kind", "ddof", "expected"), [("grpo", 1, 1.7889), ("grpo", 0, 2.0), ("dr_grpo", 1, 0.8), ("rloo", 1, 1.0)]
)
def test_the_published_vector(kind: str, ddof: int, expected: float) -> None:
    got = advantages([[1.0, 0, 0, 0, 0]], kind, ddof, 0.0)
    assert got[0, 0].item() == pytest.approx(expected, abs=5e-5)
    assert got.sum().item() == pytest.approx(0.0, abs=1e-12)


rewards = st.one_of(st.floats(-5, 5).map(lambda x: round(x, 3)), st.just(math.nan))
batches = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(rewards, min_size=size, max_size=size), min_size=1, max_size=4)
)


@settings(deadline=None)
@given(groups=batches, kind=st.sampled_from(KINDS), ddof=st.sampled_from([0, 1]))
def test_equals_the_plain_loop_with_missing_scores(groups: Groups, kind: str, ddof: int) -> None:
    want = torch.tensor(naive(groups, kind, ddof, 1e-4), dtype=torch.float64)
    torch.testing.assert_close(advantages(groups, kind, ddof), want, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_without_spread_is_exactly_zero(kind: str) -> None:
    got = advantages([[0.1] * 7, [0.1, 0.3, 0.1, 0.1, 0.1, 0.1, 0.7]], kind, eps=0.0)
    assert got[0].tolist() == [0.0] * 7
    assert got[1].all()
    assert not advantages([[0.1] * 7], kind, eps=0.0).any()


ROUNDING = {
    "sums": [0.1 + 0.2, 0.3, 0.3, math.nan],
    "fp32": [torch.tensor(x).sum().item() for x in ([0.1] * 10, [0.3, 0.7], [0.6, 0.4], [0.1, 0.9])],
    "order": [0.1 + 0.7 + 0.2, 0.2 + 0.7 + 0.1, 0.7 + 0.2 + 0.1, 1.0],
    "cancelled": [0.1 + 0.2 - 0.3, 0.0, -(0.1 + 0.2 - 0.3), 0.0],
    "large": [1e6 + 1e-9, 1e6, 1e6, 1e6],
    "negative": [-0.1 - 0.2, -0.3, -0.3, -0.3],
    "equal": [0.1] * 4,
    "one": [0.1, math.nan, math.nan, math.nan],
    "none": [math.nan] * 4,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ROUNDING))
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_rewards_that_differ_by_rounding_have_no_advantage(kind: str, name: str, eps: float) -> None:
    group = ROUNDING[name]
    for groups in ([group], [group, [0.0, 1.0, 0.0, 0.0]], [group] * 3):
        got = advantages(groups, kind, eps=eps)
        assert got[0].tolist() == [0.0] * 4
        assert got.isfinite().all()
    scores = [Score(ScoreStatus.OK if r == r else ScoreStatus.ERROR, r) for r in group]
    assert not has_spread(Group(Prompt("p", [1], "", None, {}), 0, 0, scores=scores))
    known = torch.tensor([r for r in group if r == r], dtype=torch.float64)
    if len(known):
        ends = [torch.tensor([0])] * len(known)
        assert not torch.cat(process_advantages(known.split(1), ends, [1] * len(known), ddof=1, eps=eps)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [[0.0, 1e-6], [1e-9, 2e-9], [1.0, 1.001], [-5.0, -5.0001], [1e6, 1e6 + 10]])
def test_small_differences_that_are_no_rounding_count(kind: str, group: list[float]) -> None:
    got = advantages([group], kind, eps=0.0)
    want = torch.tensor(naive([group], kind, 1, 0.0), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert differ(group)


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_score_moves_no_other_sample(kind: str) -> None:
    three = advantages([[1.0, 0.0, 0.5]], kind)
    four = advantages([[1.0, 0.0, 0.5, math.nan]], kind)
    assert four[0].tolist() == [*three[0].tolist(), 0.0]


@settings(deadline=None)
@given(groups=batches, scale=st.floats(0.01, 100), kind=st.sampled_from(KINDS))
def test_scaled_rewards_give_the_same_advantages_where_a_std_divides(groups: Groups, scale: float, kind: str) -> None:
    factor = scale if kind in ("dr_grpo", "rloo") else 1.0
    scaled = [[r * scale for r in g] for g in groups]
    torch.testing.assert_close(
        advantages(scaled, kind, eps=0.0), factor * advantages(groups, kind, eps=0.0), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
def test_process_supervision_sums_the_normalised_rewards_of_the_steps_to_come(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    step_rewards, step_ends, lengths = [], [], []
    for num in torch.randint(1, 5, (4,), generator=g).tolist():
        sizes = torch.randint(1, 4, (num,), generator=g)
        step_rewards.append(torch.rand(num, generator=g, dtype=torch.float64))
        step_ends.append(sizes.cumsum(0) - 1)
        lengths.append(int(sizes.sum()) + seed % 2)
    got = process_advantages(step_rewards, step_ends, lengths, ddof=1, eps=1e-4)
    pooled = torch.cat(step_rewards).tolist()
    mean, std = statistics.fmean(pooled), statistics.stdev(pooled)
    for mine, rewards_K, ends_K, length in zip(got, step_rewards, step_ends, lengths, strict=True):
        steps = list(zip(rewards_K.tolist(), ends_K.tolist(), strict=True))
        want = [sum((r - mean) / (std + 1e-4) for r, end in steps if end >= t) for t in range(length)]
        assert mine.tolist() == pytest.approx(want, rel=1e-6, abs=1e-9)


def test_equal_step_rewards_have_no_signal() -> None:
    step = torch.full((2,), 0.3)
    got = process_advantages([step, step], [torch.tensor([0, 2])] * 2, [3, 3], ddof=1, eps=0.0)
    assert all(not x.any() for x in got)


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """1506.02438 eq. 16, term by term."""
    follow = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, follow, values, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5)])
@pytest.mark.parametrize("seed", range(5))
def test_gae_steps_over_masked_tokens(seed: int, gamma: float, lam: float) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = (torch.randn(4, 9, generator=g, dtype=torch.float64) for _ in range(2))
    mask_BT = torch.rand(4, 9, generator=g) < 0.7
    rewards_BT[~mask_BT] = values_BT[~mask_BT] = math.nan
    got, returns = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    for b in range(4):
        kept = mask_BT[b]
        want = naive_gae(rewards_BT[b, kept].tolist(), values_BT[b, kept].tolist(), gamma, lam)
        assert got[b, kept].tolist() == pytest.approx(want, rel=1e-6)
        assert returns[b, kept].tolist() == pytest.approx((got[b, kept] + values_BT[b, kept]).tolist())
    assert not got[~mask_BT].any()
    assert not returns[~mask_BT].any()


def test_lambda_one_is_the_return_minus_the_value() -> None:
    score = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.2, 0.5, 0.9]])
    got, returns = gae(score, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(returns, torch.ones(1, 3))
    torch.testing.assert_close(got, 1 - values)


def test_the_kl_in_the_reward_sums_to_the_penalised_score() -> None:
    kl = torch.tensor([[0.5, 0.25, math.nan], [0.1, 0.2, 0.3]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    got = kl_in_reward(torch.tensor([1.0, -1.0]), kl, mask, beta=0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.05, 0.975, 0.0], [-0.01, -0.02, -1.03]]))
    assert not got.requires_grad
