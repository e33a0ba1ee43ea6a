"""An evaluation over plain objects: three prompts, four samples each, whose answers are known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from grpo_ray.config import RunConfig
from grpo_ray.config_files import build, deep_merge, parse_overrides
from grpo_ray.config_reward import RewardConfig
from grpo_ray.errors import RewardError
from grpo_ray.evaluate import EvalResult, evaluate, vote_config
from grpo_ray.rewards import ScoreInputs, resolve, score_samples
from grpo_ray.types import Prompt, SampleInfo, SampleRequest, Score, ScoreRequest, ScoreStatus, Track

ANSWERS = {
    "a": ("\\boxed{\\frac{1}{2}}", "it is 0.5", "\\boxed{7}", "\\boxed{8}"),  # 2 right, a majority of equal values
    "b": ("\\boxed{3}", "\\boxed{4}", "\\boxed{4}", "no idea"),  # 1 right, the majority wrong
    "c": ("\\boxed{9}", "\\boxed{9}", "\\boxed{9}", "\\boxed{9}"),  # 4 right
}
GOLD = {"a": "1/2", "b": "3", "c": "9"}
PROMPTS = [Prompt(name, [1], name, None, {"answer": gold}) for name, gold in GOLD.items()]


class Sampler:
    async def generate(self, request: SampleRequest) -> SampleInfo:
        text = ANSWERS[request.prompt_id][request.index]
        return SampleInfo(request.prompt_id, request.index, 1, len(text), 0, "stop", "w", ref=[text], row=0)

    def take_stats(self) -> dict[str, float]:
        return {}

    def take_tracks(self) -> list[Track]:
        return []


class LocalScorer:
    """The real functions, in this process."""

    def __init__(self, config: RewardConfig) -> None:
        self.functions = [resolve(f) for f in config.functions]

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        texts = [r.sample.ref[0] for r in requests]
        columns = {"answer": [r.columns["answer"] for r in requests]}
        return score_samples(self.functions, ScoreInputs(["q"] * len(texts), texts, [[0]] * len(texts), columns))

    def take_tracks(self) -> list[Track]:
        return []


def config(*overrides: str) -> RunConfig:
    base = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "x"}, "eval": {"path": "y"}},
        "reward": {"functions": [{"name": "accuracy"}]},
        "eval": {"num_samples": 4, "temperature": 0.6},
    }
    return build(RunConfig, deep_merge(base, parse_overrides(list(overrides))), "test")


def run(cfg: RunConfig, voter: LocalScorer | None) -> EvalResult:
    return asyncio.run(evaluate(PROMPTS, Sampler(), LocalScorer(cfg.reward), voter, cfg))


def test_every_measure_is_a_mean_over_prompts() -> None:
    cfg = config()
    votes = vote_config(cfg)
    assert votes is not None
    assert votes.unit == "group"
    result = run(cfg, LocalScorer(votes))
    got = {name: e.mean for name, e in result.measures.items()}
    assert got == pytest.approx(
        {
            "pass@1": (2 / 4 + 1 / 4 + 1) / 3,
            "pass@2": ((1 - 1 / 6) + (1 - 3 / 6) + 1) / 3,
            "pass@4": 1.0,
            "cons@4": 2 / 3,
        }
    )
    assert result.accuracy == result.measures["pass@1"]
    mean = 1.75 / 3
    variance = sum((x - mean) ** 2 for x in (0.5, 0.25, 1.0)) / 2
    assert result.accuracy.standard_error == pytest.approx((variance / 3) ** 0.5)
    assert (result.num_prompts, result.num_samples) == (3, 4)


def test_without_a_voter_there_is_no_consensus() -> None:
    assert list(run(config(), None).measures) == ["pass@1", "pass@2", "pass@4"]
    one = config("eval.num_samples=1")
    assert vote_config(one) is None
    assert {name: e.mean for name, e in run(one, None).measures.items()} == {"pass@1": pytest.approx(2 / 3 + 1 / 3)}


def test_answers_are_compared_as_the_accuracy_does() -> None:
    assert [f.name for f in (vote_config(config()) or RewardConfig()).functions] == [
        "grpo_ray.rewards.votes.math_votes"
    ]
    other = vote_config(config("reward.functions=[{name: countdown}]"))
    assert other is not None
    assert [f.name for f in other.functions] == ["grpo_ray.rewards.votes.text_votes"]


def test_a_vote_that_fails_ends_the_evaluation() -> None:
    class Broken(LocalScorer):
        async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
            return [Score(ScoreStatus.TIMEOUT, float("nan"), (), "10 s are over") for _ in requests]

    with pytest.raises(ExceptionGroup) as e:
        run(config(), Broken(RewardConfig()))
    assert e.group_contains(RewardError, match="timeout.*10 s are over")
