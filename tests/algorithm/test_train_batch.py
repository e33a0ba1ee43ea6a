"""From scored groups to a batch."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from grpo_ray.algorithm.advantages import ADVANTAGES
from grpo_ray.algorithm.train_batch import cut_batch, penalised_advantages, set_advantages
from grpo_ray.batch.pack import token_values
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.spread import has_spread
from grpo_ray.types import Group, Prompt, SampleInfo, Score, ScoreStatus, Step, TrainSample

NAN = math.nan
Steps = list[tuple[int, float]]


def group(rewards: list[float], reasons: list[str] | None = None) -> Group:
    """NaN: no reward applied."""
    reasons = reasons or ["stop"] * len(rewards)
    samples = [SampleInfo("p", i, 3, 5, 0, reason, "w-0", ref=[], row=i) for i, reason in enumerate(reasons)]
    scores = [Score(ScoreStatus.NOT_APPLICABLE if r != r else ScoreStatus.OK, r) for r in rewards]
    return Group(Prompt("p", [1, 2, 3], "", None, {}), 0, 0, samples, scores)


def config(algorithm: AlgorithmConfig) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"tiny": {}},
            "data": {"train": {"path": "x"}},
            "reward": {"functions": [{"name": "r"}]},
            "algorithm": algorithm.model_dump(),
        }
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
    batch = cut_batch(groups, 1, config(algorithm))
    assert [s.loss_mask for s in batch.samples] == [True, False, True]


@pytest.mark.parametrize("mask", [False, True])
def test_a_truncated_sample_keeps_its_part_in_the_baseline(mask: bool) -> None:
    algorithm = AlgorithmConfig(advantage="dr_grpo", mask_truncated=mask)
    groups = [group([1.0, 0.0, 0.5], ["stop", "length", "stop"])]
    set_advantages(groups, algorithm)
    batch = cut_batch(groups, 1, config(algorithm))
    assert [s.advantage for s in batch.samples] == pytest.approx([0.5, -0.5, 0.0])
    assert [s.loss_mask for s in batch.samples] == [True, not mask, True]


@pytest.mark.parametrize("kind", [*ADVANTAGES, "gae"])
def test_with_a_kl_in_the_reward_the_learner_is_given_rewards(kind: str) -> None:
    algorithm = AlgorithmConfig(advantage=kind, beta=0.1, kl_in="reward", mask_truncated=True)
    groups = [group([1.0, NAN, 0.25], ["stop", "stop", "length"])]
    set_advantages(groups, algorithm)
    batch = cut_batch(groups, 1, config(algorithm))
    assert [s.reward for s in batch.samples] == pytest.approx([1.0, NAN, 0.25], nan_ok=True)
    assert [s.advantage for s in batch.samples] == [None] * 3
    assert [s.loss_mask for s in batch.samples] == [True, False, False]


def naive_penalised(rewards: list[list[float]], kls: list[list[float]], kind: str, beta: float) -> list[list[float]]:
    """Term by term, with the schema's ddof 1 and eps 1e-4. NaN: no score."""
    left = [[r - beta * k for r, k in zip(*rows, strict=True)] for rows in zip(rewards, kls, strict=True)]
    scored = [[x for x in row if x == x] for row in left]
    centred = [[x - statistics.fmean(own) for x in own] for own in scored]
    out = []
    for row, own in zip(left, scored, strict=True):
        new = []
        for x in row:
            if x != x or len(own) < 2:
                new.append(0.0)
                continue
            if kind == "rloo":
                others = list(own)
                others.remove(x)
                new.append(x - statistics.fmean(others))
                continue
            scale = {
                "grpo": statistics.stdev(own) + 1e-4,
                "dr_grpo": 1.0,
                "reinforce_pp_baseline": statistics.stdev(x for g in centred for x in g) + 1e-4,
                "batch_std": statistics.stdev(x for g in scored for x in g) + 1e-4,
            }[kind]
            new.append((x - statistics.fmean(own)) / scale)
        out.append(new)
    return out


@pytest.mark.parametrize("kind", list(ADVANTAGES))
@pytest.mark.parametrize("seed", range(4))
def test_group_advantages_of_penalised_rewards_are_the_formulas(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    sizes = [4, 4, 3, 1]
    rewards = [[NAN if rng.random() < 0.2 else rng.choice([0.0, 1.0, 0.3]) for _ in range(n)] for n in sizes]
    kls = [[rng.gauss(2, 3) for _ in range(n)] for n in sizes]
    flat = [
        TrainSample([], 0, f"p{g}", i, 3, 5, g, loss_mask=rng.random() < 0.7, reward=r)
        for g, row in enumerate(rewards)
        for i, r in enumerate(row)
    ]
    penalties = 0.05 * torch.tensor([k for row in kls for k in row], dtype=torch.float64)
    algorithm = AlgorithmConfig(advantage=kind, beta=0.05, kl_in="reward")
    got = penalised_advantages(flat, penalties, algorithm)
    want = naive_penalised(rewards, kls, kind, 0.05)
    assert got.tolist() == pytest.approx([x for row in want for x in row], rel=1e-6, abs=1e-9)


def test_a_kl_that_is_no_number_does_not_pass_for_a_missing_score() -> None:
    samples = [TrainSample([], 0, "p", i, 3, 5, 0, reward=float(i)) for i in range(3)]
    algorithm = AlgorithmConfig(advantage="rloo", beta=0.05, kl_in="reward")
    got = penalised_advantages(samples, torch.tensor([0.0, NAN, 0.0], dtype=torch.float64), algorithm)
    assert got.isnan().all()


def group_of_steps(steps: list[Steps | float], lengths: list[int], reasons: list[str] | None = None) -> Group:
    """A float: an outcome; NaN: no score."""
    reasons = reasons or ["stop"] * len(steps)
    samples = [
        SampleInfo("p", i, 3, n, 0, reason, "w-0", ref=[], row=i)
        for i, (n, reason) in enumerate(zip(lengths, reasons, strict=True))
    ]
    scores = []
    for one in steps:
        own = () if isinstance(one, float) else tuple(Step(end, value) for end, value in one)
        value = one if isinstance(one, float) else sum(value for _, value in one)
        scores.append(Score(ScoreStatus.NOT_APPLICABLE if value != value else ScoreStatus.OK, value, steps=own))
    return Group(Prompt("p", [1, 2, 3], "", None, {}), 0, 0, samples, scores)


PROCESS = AlgorithmConfig(advantage="process")


def process_tokens(groups: list[Group], algorithm: AlgorithmConfig = PROCESS) -> list[list[float]]:
    """Advantages of the tokens of each sample, as the learner lays them out."""
    set_advantages(groups, algorithm)
    batch = cut_batch(groups, 1, config(algorithm))
    return [token_values(s.steps, s.num_tokens).tolist() for s in batch.samples]


@pytest.mark.parametrize("seed", range(5))
def test_process_supervision_is_the_papers_formula_for_every_token(seed: int) -> None:
    """DeepSeekMath 2402.03300, 4.1.3: r~ = (r - mean(R)) / std(R) over all steps of the group; A_t = sum over steps that end at t
    or after it."""
    rng = random.Random(seed)
    groups, want = [], []
    for _ in range(3):
        lengths = [rng.randint(4, 9) for _ in range(4)]
        steps: list[Steps | float] = []
        for n in lengths:
            ends = sorted(rng.sample(range(n), rng.randint(1, 3)))
            steps.append([(end, rng.choice([-1.0, 0.5, rng.random()])) for end in ends])
        steps[1] = rng.random()
        steps[3] = NAN if rng.random() < 0.5 else steps[3]
        groups.append(group_of_steps(steps, lengths))
        explicit = [[(n - 1, s)] if isinstance(s, float) else s for s, n in zip(steps, lengths, strict=True)]
        pooled = [r for own in explicit for _, r in own if r == r]
        mean, std = statistics.fmean(pooled), statistics.stdev(pooled)
        for own, n in zip(explicit, lengths, strict=True):
            scored = [(end, r) for end, r in own if r == r]
            want.append([sum((r - mean) / (std + 1e-4) for end, r in scored if end >= t) for t in range(n)])
    got = process_tokens(groups)
    assert [x for row in got for x in row] == pytest.approx([x for row in want for x in row], rel=1e-6, abs=1e-9)
    for g in groups:
        for mean_A, steps_A, info in zip(g.advantages, g.steps, g.samples, strict=True):
            assert mean_A == pytest.approx(statistics.fmean(token_values(steps_A, info.num_tokens).tolist()), abs=1e-12)


def test_outcomes_alone_give_every_token_the_advantage_of_grpo() -> None:
    rewards = [1.0, 0.25, NAN, 0.0]
    tokens = process_tokens([group_of_steps(list(rewards), [3, 1, 4, 2])])
    plain = [group(rewards)]
    set_advantages(plain, AlgorithmConfig())
    for row, advantage in zip(tokens, plain[0].advantages, strict=True):
        assert row == pytest.approx([advantage] * len(row), rel=1e-12)


def test_under_process_a_truncated_sample_and_an_empty_one_keep_their_part_in_the_baseline() -> None:
    steps: list[Steps | float] = [[(1, 1.0), (3, 0.0)], [(4, 0.5)], 0.25]
    algorithm = AlgorithmConfig(advantage="process", mask_truncated=True)
    groups = [group_of_steps(steps, [4, 5, 0], ["stop", "length", "stop"])]
    tokens = process_tokens(groups, algorithm)
    mean, std = statistics.fmean([1, 0, 0.5, 0.25]), statistics.stdev([1, 0, 0.5, 0.25])
    first, last = (1 - mean) / (std + 1e-4), (0 - mean) / (std + 1e-4)
    assert tokens[0] == pytest.approx([first + last] * 2 + [last] * 2)
    assert tokens[2] == []
    assert [s.loss_mask for s in cut_batch(groups, 1, config(algorithm)).samples] == [True, False, True]


def test_spread_is_of_the_steps_where_there_are_some() -> None:
    # Equal sums, and yet the second sample was right first and wrong after.
    assert has_spread(group_of_steps([[(1, 0.5), (3, 0.5)], [(1, 1.0), (3, 0.0)]], [4, 4]))
    # Different sums of equal steps: nothing to compare, as the advantages say.
    flat: list[Steps | float] = [[(1, 0.5), (3, 0.5)], [(3, 0.5)], NAN]
    assert not has_spread(group_of_steps(list(flat), [4, 4, 4]))
    assert process_tokens([group_of_steps(list(flat), [4, 4, 4])]) == [[0.0] * 4] * 3
    assert process_tokens([group_of_steps([NAN, NAN], [2, 2])]) == [[0.0] * 2] * 2


@pytest.mark.parametrize("staleness", [0, 2])
def test_no_batch_holds_a_token_that_is_older_than_the_staleness_bound(staleness: int) -> None:
    """The oldest token of any sample counts, and the bound itself is young enough."""
    algorithm = AlgorithmConfig(max_staleness=staleness)
    cfg = config(algorithm)
    young, old = group([1.0, 0.0]), group([1.0, 0.0])
    old.samples[1] = SampleInfo("p", 1, 3, 5, 5 - staleness, "stop", "w-0", ref=[], row=1)
    young.samples[:] = [SampleInfo("p", i, 3, 5, 5, "stop", "w-0", ref=[], row=i) for i in range(2)]
    old.samples[0] = young.samples[0]
    set_advantages([young, old], algorithm)
    assert len(cut_batch([young, old], 6, cfg).samples) == 4
    with pytest.raises(AssertionError, match=f"holds tokens of version {5 - staleness}, the bound is {6 - staleness}"):
        cut_batch([young, old], 7, cfg)
