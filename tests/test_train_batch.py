"""From scored groups to a batch."""

from __future__ import annotations

import math

import pytest

from grpo_ray.config import AlgorithmConfig, RunConfig
from grpo_ray.train_batch import cut_batch, has_spread, set_advantages
from grpo_ray.types import Group, Prompt, SampleInfo, Score, ScoreStatus

NAN = math.nan


def group(rewards: list[float], reasons: list[str] | None = None) -> Group:
    """NaN: no reward applied."""
    reasons = reasons or ["stop"] * len(rewards)
    samples = [SampleInfo("p", i, 3, 5, 0, reason, "w-0", ref=[], row=i) for i, reason in enumerate(reasons)]
    scores = [Score(ScoreStatus.NOT_APPLICABLE if r != r else ScoreStatus.OK, r) for r in rewards]
    return Group(Prompt("p", [1, 2, 3], "", None, {}), 0, 0, samples, scores)


def config(algorithm: AlgorithmConfig) -> RunConfig:
    return RunConfig(
        model={"tiny": {}},
        data={"train": {"path": "x"}},
        reward={"functions": [{"name": "r"}]},
        algorithm=algorithm.model_dump(),
    )


@pytest.mark.parametrize(
    ("rewards", "spread"),
    [([1, 1, 1], False), ([1, 1, 0], True), ([1, NAN, 1], False), ([1, NAN, 0], True), ([NAN, NAN, NAN], False)],
)
def test_a_sample_without_a_score_is_no_spread(rewards: list[float], spread: bool) -> None:
    assert has_spread(group(rewards)) == spread


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("dr_grpo", [0.5, 0.0, -0.5]), ("rloo", [1.0, 0.0, -1.0]), ("grpo", [1 / 2**0.5, 0.0, -1 / 2**0.5])],
)
def test_a_sample_without_a_score_has_no_part_in_anything(kind: str, expected: list[float]) -> None:
    groups = [group([1.0, NAN, 0.0])]
    algorithm = AlgorithmConfig(advantage=kind, std_eps=0.0)
    set_advantages(groups, algorithm)
    assert groups[0].advantages == pytest.approx(expected)
    batch = cut_batch(groups, 0, config(algorithm))
    assert [s.loss_mask for s in batch.samples] == [True, False, True]


@pytest.mark.parametrize("mask", [False, True])
def test_a_truncated_sample_keeps_its_part_in_the_baseline(mask: bool) -> None:
    algorithm = AlgorithmConfig(advantage="dr_grpo", mask_truncated=mask)
    groups = [group([1.0, 0.0, 0.5], ["stop", "length", "stop"])]
    set_advantages(groups, algorithm)
    batch = cut_batch(groups, 0, config(algorithm))
    assert [s.advantage for s in batch.samples] == pytest.approx([0.5, -0.5, 0.0])
    assert [s.loss_mask for s in batch.samples] == [True, not mask, True]
