"""Credit of episodes: rewards of turns, values over the environment's tokens, and episodes that are left out or empty; by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from grpo_ray.algorithm.advantages import gae, gae_of_segments
from grpo_ray.algorithm.train_batch import cut_batch, set_advantages
from grpo_ray.batch.pack import PackItem, pack, token_values
from grpo_ray.batch.segments import Segments
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.health.tally import is_empty
from grpo_ray.types import Group, Prompt, SampleInfo, Score, ScoreStatus, Step

NAN = math.nan


def config(algorithm: AlgorithmConfig) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"train": {"path": "x"}},
            "reward": {"functions": [{"name": "r"}]},
            "algorithm": algorithm.model_dump(),
        }
    )


def score(value: float, steps: tuple[Step, ...] = ()) -> Score:
    """NaN: its environment died."""
    return Score(ScoreStatus.CRASHED if value != value else ScoreStatus.OK, value, steps=steps)


def group(infos: list[SampleInfo], scores: list[Score], version: int = 4) -> Group:
    return Group(Prompt("p", [1, 2], "", None, {}), 0, version, infos, scores)


def episode(index: int, mask: str, *, version: int | None = 4, reason: str = "stop") -> SampleInfo:
    """`m` is a token of the model, `.` one of the environment."""
    return SampleInfo("p", index, 2, len(mask), version, reason, "w", [], index, mask.count("."))


def packed_advantages(mask: str, steps: tuple[Step, ...]) -> list[float]:
    sampled = np.array([c == "m" for c in mask])
    num = len(mask)
    zeros = np.zeros(num, np.float32)
    item = PackItem(np.ones(2, int), np.ones(num, int), zeros, token_values(steps, num), 1.0, 0, sampled=sampled)
    return [round(a, 6) for a in pack([item]).advantages.tolist()]


def test_rewards_of_turns_reach_the_turns_before_them_over_the_environments_tokens() -> None:
    """The rewards 1, 0 and 0.5 of all steps have mean 0.5 and standard deviation 0.5: normalised they are 1, -1 and 0."""
    masks = ["mm..mm..", "mmm"]
    infos = [episode(i, mask) for i, mask in enumerate(masks)]
    scores = [score(1.0, (Step(1, 1.0), Step(5, 0.0))), score(0.5)]
    made = group(infos, scores)
    algorithm = AlgorithmConfig(advantage="process", std_eps=0.0)
    set_advantages([made], algorithm)
    samples = cut_batch([made], 5, config(algorithm)).samples
    assert packed_advantages(masks[0], samples[0].steps) == [0, 0, -1, -1]
    assert packed_advantages(masks[1], samples[1].steps) == [0, 0, 0]
    assert [s.num_sampled for s in samples] == [4, 3]
    assert [s.num_tokens for s in samples] == [8, 3]


def test_a_value_sees_the_next_token_of_the_model_whatever_lies_between() -> None:
    """m . . m, reward 1 at the end, values 0.5 and 0.25, gamma = lambda = 0.5: A_3 = 0.75, A_0 = 0.5 x 0.25 - 0.5 + 0.25 A_3."""
    want = [0.125 - 0.5 + 0.25 * 0.75, 0.75]
    values = torch.tensor([0.5, 0.25], dtype=torch.float64)
    got, returns = gae_of_segments(
        torch.tensor([1.0], dtype=torch.float64),
        None,
        values,
        Segments.of(torch.zeros(2, dtype=torch.int64)),
        beta=0.0,
        gamma=0.5,
        lam=0.5,
    )
    assert got.tolist() == pytest.approx(want)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(want, values.tolist(), strict=True)])
    mask = torch.tensor([[True, False, False, True]])
    wide = torch.tensor([[0.5, 9.0, NAN, 0.25]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    over, _ = gae(rewards, wide, mask, gamma=0.5, lam=0.5)
    assert over[mask].tolist() == pytest.approx(want)


@pytest.mark.parametrize("missing", [0, 3, 7])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_with_one_of_eight_missing_each_of_the_others_has_its_own_advantage(kind: str, missing: int) -> None:
    rewards = [float(i * i) for i in range(8)]
    infos = [episode(i, "m" * (i + 1)) for i in range(8)]
    made = group(infos, [score(NAN if i == missing else r) for i, r in enumerate(rewards)])
    algorithm = AlgorithmConfig(advantage=kind, std_eps=0.0)
    set_advantages([made], algorithm)
    known = [r for i, r in enumerate(rewards) if i != missing]
    mean = sum(known) / 7
    scale = {
        "grpo": 1 / math.sqrt(sum((r - mean) ** 2 for r in known) / 6),
        "dr_grpo": 1.0,
        "rloo": 7 / 6,
    }[kind]
    batch = cut_batch([made], 5, config(algorithm))
    for sample in batch.samples:
        lost = sample.index == missing
        assert sample.loss_mask is not lost
        want = 0.0 if lost else (rewards[sample.index] - mean) * scale
        assert sample.advantage == pytest.approx(want)
    assert math.isnan(batch.samples[missing].reward)


@pytest.mark.parametrize("advantage", ["grpo", "process", "gae"])
def test_an_episode_without_a_sampled_token_breaks_nothing_and_is_not_trained(advantage: str) -> None:
    infos = [episode(0, "..", version=None, reason="context_overflow"), episode(1, "m.m"), episode(2, "")]
    made = group(infos, [score(1.0), score(0.0), score(0.0)])
    assert made.min_version == 4
    assert group([episode(0, "..", version=None)], [score(1.0)], version=7).min_version == 7
    algorithm = AlgorithmConfig(advantage=advantage) if advantage != "gae" else AlgorithmConfig(preset="ppo")
    set_advantages([made], algorithm)
    batch = cut_batch([made], 5, config(algorithm))
    assert [s.num_sampled for s in batch.samples] == [0, 2, 0]
    assert [is_empty(info) for info in infos] == [True, False, True]


def test_episodes_that_had_no_room_for_more_are_masked_with_those_that_were_cut() -> None:
    reasons = ["stop", "length", "context_overflow", "max_turns", "environment_done"]
    infos = [episode(i, "m.m", reason=reason) for i, reason in enumerate(reasons)]
    made = group(infos, [score(float(i)) for i in range(len(reasons))])
    for masks in (False, True):
        algorithm = AlgorithmConfig(mask_truncated=masks)
        set_advantages([made], algorithm)
        batch = cut_batch([made], 5, config(algorithm))
        assert [s.loss_mask for s in batch.samples] == [True, not masks, not masks, True, True]
        assert [s.advantage != 0 for s in batch.samples] == [True, True, False, True, True]
