"""Advantages against a plain loop in Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.advantages import group_advantages


def naive(rewards: list[float], ok: list[bool], normalize: bool, ddof: int, eps: float) -> list[float]:
    scored = [r for r, o in zip(rewards, ok, strict=True) if o]
    if len(set(scored)) < 2:
        return [0.0] * len(rewards)
    mean = statistics.fmean(scored)
    std = math.sqrt(sum((r - mean) ** 2 for r in scored) / (len(scored) - ddof))
    return [
        ((r - mean) / (std + eps) if normalize else r - mean) if o else 0.0 for r, o in zip(rewards, ok, strict=True)
    ]


@pytest.mark.parametrize(("normalize", "ddof", "expected"), [(True, 1, 1.7889), (True, 0, 2.0), (False, 1, 0.8)])
def test_the_published_vector(normalize: bool, ddof: int, expected: float) -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64)
    got = group_advantages(rewards, normalize_std=normalize, ddof=ddof, eps=0.0)
    assert got[0, 0].item() == pytest.approx(expected, abs=5e-5)
    assert got.sum().item() == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None)
@given(
    groups=st.integers(2, 6).flatmap(
        lambda g: st.lists(
            st.lists(st.tuples(st.floats(-5, 5).map(lambda x: round(x, 3)), st.booleans()), min_size=g, max_size=g),
            min_size=1,
            max_size=4,
        )
    ),
    normalize=st.booleans(),
    ddof=st.sampled_from([0, 1]),
)
def test_equals_the_plain_loop_with_missing_scores(
    groups: list[list[tuple[float, bool]]], normalize: bool, ddof: int
) -> None:
    rewards = torch.tensor([[r if ok else math.nan for r, ok in g] for g in groups], dtype=torch.float64)
    mask = torch.tensor([[ok for _, ok in g] for g in groups])
    got = group_advantages(rewards, mask_PG=mask, normalize_std=normalize, ddof=ddof, eps=1e-4)
    want = [naive([r for r, _ in g], [ok for _, ok in g], normalize, ddof, 1e-4) for g in groups]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=1e-6)


def test_a_group_without_spread_is_exactly_zero() -> None:
    rewards = torch.full((1, 7), 0.1)
    for normalize in (True, False):
        assert group_advantages(rewards, normalize_std=normalize, ddof=1, eps=0.0).tolist() == [[0.0] * 7]


def test_a_failed_score_moves_no_other_sample() -> None:
    three = group_advantages(torch.tensor([[1.0, 0.0, 0.5]]), normalize_std=True, ddof=1, eps=1e-4)
    four = group_advantages(
        torch.tensor([[1.0, 0.0, 0.5, math.nan]]),
        mask_PG=torch.tensor([[True, True, True, False]]),
        normalize_std=True,
        ddof=1,
        eps=1e-4,
    )
    assert four[0, :3].tolist() == three[0].tolist()
    assert four[0, 3].item() == 0.0
