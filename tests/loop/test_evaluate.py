"""An evaluation over plain objects: three prompts, four samples each, whose answers are known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from grpo_ray.config.loading import build, deep_merge, parse_overrides
from grpo_ray.config.reward import RewardConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import RewardError
from grpo_ray.loop.evaluate import eval_event, evaluate, vote_config
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.table import resolve
from grpo_ray.telemetry.measures import EvalResult
from grpo_ray.telemetry.metrics import eval_metrics
from grpo_ray.types import Prompt, SampleInfo, SampleRequest, Score, ScoreRequest, ScoreStatus, Track
from launch.run.live import eval_line
from tests.scoring import score_samples

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
        columns = {name: [r.columns[name] for r in requests] for name in requests[0].columns}
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


def run(cfg: RunConfig, voter: LocalScorer | None, prompts: Sequence[Prompt] = PROMPTS) -> EvalResult:
    return asyncio.run(evaluate(prompts, Sampler(), LocalScorer(cfg.reward), voter, cfg))


def with_golds(**golds: str) -> list[Prompt]:
    return [Prompt(name, [1], name, None, {"answer": gold}) for name, gold in golds.items()]


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


def test_samples_are_drawn_as_the_evaluation_asks_for_and_not_as_training_does() -> None:
    cfg = config(
        "rollout.temperature=0.8",
        "rollout.top_p=0.9",
        "rollout.top_k=7",
        "rollout.min_p=0.1",
        "rollout.max_completion_length=99",
        "eval.top_p=0.5",
    )
    asked: list[SampleRequest] = []

    class Asked(Sampler):
        async def generate(self, request: SampleRequest) -> SampleInfo:
            asked.append(request)
            return await super().generate(request)

    asyncio.run(evaluate(PROMPTS, Asked(), LocalScorer(cfg.reward), None, cfg))
    assert {(r.params.temperature, r.params.top_p) for r in asked} == {(0.6, 0.5)}
    assert {(r.params.top_k, r.params.min_p, r.params.max_tokens) for r in asked} == {(0, 0.0, 99)}
    assert len({r.seed for r in asked}) == 12


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_mean_length_is_that_of_all_samples(k: int) -> None:
    result = run(config(f"eval.num_samples={k}"), None)
    lengths = [len(text) for answers in ANSWERS.values() for text in answers[:k]]
    assert result.mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert eval_metrics(result)["eval/mean_length"] == result.mean_length


def test_without_a_voter_there_is_no_consensus() -> None:
    assert list(run(config(), None).measures) == ["pass@1", "pass@2", "pass@4"]
    one = config("eval.num_samples=1")
    assert vote_config(one) is None
    assert {name: e.mean for name, e in run(one, None).measures.items()} == {"pass@1": pytest.approx(2 / 3 + 1 / 3)}


def test_immediate_future_are_compared_as_the_accuracy_does() -> None:
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


@pytest.mark.parametrize("samples", [1, 4])
def test_what_the_accuracy_does_not_apply_to_is_neither_right_nor_wrong(samples: int) -> None:
    """`c` is right in all samples; the golds of the others are words."""
    cfg = config(f"eval.num_samples={samples}")
    votes = vote_config(cfg)
    result = run(cfg, None if votes is None else LocalScorer(votes), with_golds(a="Paris", b="Rome", c="9"))
    measures = {"pass@1", "pass@2", "pass@4", "cons@4"} if samples > 1 else {"pass@1"}
    assert {name: (e.mean, e.standard_error) for name, e in result.measures.items()} == dict.fromkeys(measures, (1, 0))
    assert (result.mean_reward, result.num_measured, result.num_not_applicable) == (1.0, samples, 2 * samples)
    assert result.warning is None
    event = eval_event(7, "", result)
    assert (event.accuracy, event.n, event.not_applicable) == (1.0, samples, 2 * samples)
    assert eval_line(event).startswith(
        f"step 7: held-out accuracy 100.0% ± 0.0 ({samples} samples, {2 * samples} not applicable)"
    )
    assert eval_metrics(result)["eval/not_applicable"] == 2 * samples


def test_an_accuracy_that_applies_to_nothing_is_absent_and_the_reason_is_told() -> None:
    cfg = config("reward.functions=[{name: accuracy}, {name: think_format}]")
    result = run(cfg, LocalScorer(vote_config(cfg) or cfg.reward), with_golds(a="Paris", b="Rome"))
    assert result.accuracy is None
    assert result.measures == {}
    assert result.mean_reward == 0.0, "the other reward applies"
    assert result.warning is not None
    assert "none of 8 samples: accuracy can't read the right answers of column answer" in result.warning
    assert "'Paris'" in result.warning
    assert "held-out accuracy none (0 samples, 8 not applicable)" in eval_line(eval_event(0, "", result))
    assert {"eval/accuracy", "eval/standard_error"}.isdisjoint(eval_metrics(result))


def test_rows_of_other_sources_have_no_part_in_the_accuracy_or_the_mean_reward() -> None:
    cfg = config("reward.functions=[{name: accuracy, sources: [math]}]", "eval.num_samples=1")
    rows = [replace(p, columns=p.columns | {"source": "math" if p.id != "b" else "chat"}) for p in PROMPTS]
    result = run(cfg, None, rows)
    assert result.accuracy is not None
    assert (result.accuracy.mean, result.mean_reward, result.num_not_applicable) == (1.0, 1.0, 1)
    chat = [replace(p, columns=p.columns | {"source": "chat"}) for p in PROMPTS]
    none = run(cfg, None, chat)
    assert none.mean_reward is None
    assert none.warning is not None
    assert "accuracy is for the sources math, and here column source is 'chat'" in none.warning


def test_of_a_prompt_only_the_samples_that_the_accuracy_judges_count() -> None:
    """A function that does not judge answers without a box: of each prompt three samples are left."""
    cfg = config("reward.functions=[{name: tests.loop.test_evaluate.in_a_box}]")
    votes = vote_config(cfg)
    assert votes is not None
    result = run(cfg, LocalScorer(votes), with_golds(a="7", b="4"))
    assert result.num_not_applicable == 2
    assert {name: e.mean for name, e in result.measures.items()} == {
        "pass@1": pytest.approx((1 / 3 + 2 / 3) / 2),
        "pass@2": pytest.approx(((1 - 1 / 3) + 1) / 2),
        "cons@4": pytest.approx((1 / 3 + 1) / 2),
    }


def in_a_box(completions: list[str], answer: list[str]) -> list[float | None]:
    return [float(f"{{{a}}}" in c) if "boxed" in c else None for c, a in zip(completions, answer, strict=True)]
