"""Metric values of a hand-made set of groups, and a clock that is turned by hand."""

from __future__ import annotations

import math

import pytest

from grpo_ray.telemetry.catalogue import METRICS, describe
from grpo_ray.telemetry.measures import Estimate, EvalResult
from grpo_ray.telemetry.metrics import TimeKeeper, eval_metrics, step_metrics
from grpo_ray.types import Group, Prompt, RewardScore, SampleInfo, Score, ScoreStatus, Step, SyncReport, UpdateReport


def info(prompt: str, index: int, tokens: int, version: int = 4, finish: str = "stop") -> SampleInfo:
    return SampleInfo(prompt, index, 5, tokens, version, finish, "rollout-0", None, index)


def ok(accuracy: float, style: float | None) -> Score:
    """accuracy has weight 1, style 0.5; None: style does not apply."""
    style_status = ScoreStatus.NOT_APPLICABLE if style is None else ScoreStatus.OK
    parts = (
        RewardScore("accuracy", ScoreStatus.OK, accuracy, seconds=0.25),
        RewardScore("style", style_status, math.nan if style is None else style, seconds=0.5),
    )
    return Score(ScoreStatus.OK, accuracy + 0.5 * (style or 0.0), parts)


def failed() -> Score:
    part = RewardScore("accuracy", ScoreStatus.TIMEOUT, math.nan, "10 s are over", seconds=10.0)
    return Score(ScoreStatus.TIMEOUT, 0.0, (part,), part.detail)


def group(name: str, infos: list[SampleInfo], scores: list[Score]) -> Group:
    prompt = Prompt(name, [1, 2, 3, 4, 5], "?", None, {})
    return Group(prompt, 0, 4, samples=infos, scores=scores, advantages=[0.0] * len(infos))


@pytest.fixture
def metrics() -> dict[str, float]:
    a = group("a", [info("a", 0, 10), info("a", 1, 20, finish="length")], [ok(1.0, 0.5), ok(0.0, 1.0)])
    b = group("b", [info("b", 0, 30, version=3), info("b", 1, 40)], [ok(1.0, None), ok(1.0, None)])
    c = group("c", [info("c", 0, 50), info("c", 1, 60)], [failed(), ok(0.0, 0.0)])
    return step_metrics(
        [a, b, c],
        UpdateReport(step=5, metrics={"loss/policy": 0.125, "grad_norm": 2.0, "kl/ref": math.nan}, seconds=1.5),
        SyncReport(version=5, seconds=0.5, pause_seconds=0.25, num_bytes=4096, checksum="x", num_engines=2),
        sampler_stats={"busy_s": 1.75},
        seconds={"rollout": 2.0, "update": 1.5, "other": 0.5, "step": 4.0},
        dropped={"reward_failed": 2},
        failed={"accuracy": 3},
    )


def test_failed_and_not_applicable_scores_have_no_part_in_means(metrics: dict[str, float]) -> None:
    # Rewards 1.25, 0.5, 1, 1, 0: the failed score was given 0 by the policy `value`, and still does not count.
    assert metrics["reward/mean"] == pytest.approx(0.75)
    assert metrics["reward/accuracy/mean"] == pytest.approx(0.6)
    assert metrics["reward/style/mean"] == pytest.approx(0.5)
    assert (metrics["reward/not_applicable"], metrics["reward/style/not_applicable"]) == (0, 2)
    assert "reward/accuracy/not_applicable" not in metrics


def test_standard_deviations_divide_by_n_minus_1(metrics: dict[str, float]) -> None:
    assert metrics["reward/std"] == pytest.approx(math.sqrt((0.25 + 0.0625 + 0.0625 + 0.0625 + 0.5625) / 4))
    assert metrics["reward/group_std"] == pytest.approx((0.75 / math.sqrt(2) + 0.0) / 2)
    assert metrics["reward/style/std"] == pytest.approx(0.5)


def test_counts_and_lengths(metrics: dict[str, float]) -> None:
    expected = {
        "completions/mean_length": 35.0,
        "completions/min_length": 10.0,
        "completions/max_length": 60.0,
        "completions/mean_terminated_length": 38.0,
        "completions/clipped_ratio": 1 / 6,
        "prompts/mean_length": 5.0,
        "groups/count": 3.0,
        "groups/no_signal_fraction": 2 / 3,
        "groups/dropped": 2.0,
        "groups/dropped/reward_failed": 2.0,
        "reward/failed": 3.0,
        "reward/accuracy/failed": 3.0,
        "reward/busy_s": 5 * 0.75 + 10.0,
        "staleness/mean": 1 / 6,
        "staleness/max": 1.0,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_reports_and_rates_are_taken_over(metrics: dict[str, float]) -> None:
    expected = {
        "loss/policy": 0.125,
        "grad_norm": 2.0,
        "rollout/busy_s": 1.75,
        "sync/pause_s": 0.25,
        "sync/bytes": 4096.0,
        "sync/engines": 2.0,
        "time/step": 4.0,
        "time/rollout": 2.0,
        "throughput/tokens_per_s": 210 / 4.0,
        "throughput/rollout_tokens_per_s": 105.0,
        "throughput/samples_per_s": 1.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(metrics["kl/ref"])


def test_a_figure_without_data_is_left_out() -> None:
    lone = group("a", [info("a", 0, 9, finish="length")], [failed()])
    out = step_metrics([lone], UpdateReport(5, {}, 0.0), None, sampler_stats={}, seconds={}, dropped={}, failed={})
    absent = {"reward/mean", "reward/std", "reward/accuracy/mean", "completions/mean_terminated_length", "sync/bytes"}
    assert absent.isdisjoint(out)
    assert out["groups/no_signal_fraction"] == 1.0


def test_every_name_is_documented(metrics: dict[str, float]) -> None:
    result = EvalResult({"pass@1": Estimate(0.5, 0.1), "cons@8": Estimate(0.75, 0.2)}, 25, 8, 0.4, 30.0)
    out = metrics | eval_metrics(result) | eval_metrics(result, "math")
    assert [name for name in out if describe(name)[0] == name] == []
    assert describe("reward/style/mean")[0] == METRICS["reward/*/mean"][0].replace("*", "style")
    assert describe("nobody/knows") == ("nobody/knows", "")
    for prefix in ("eval", "eval/math"):
        assert (out[f"{prefix}/accuracy"], out[f"{prefix}/standard_error"]) == (0.5, 0.1)
        assert (out[f"{prefix}/pass@1"], out[f"{prefix}/cons@8"]) == (0.5, 0.75)
        assert out[f"{prefix}/standard_error/cons@8"] == 0.2
    assert describe("eval/cons@8")[0] == "Held-out accuracy of the majority vote over 8 samples"


def test_a_rate_of_sampling_is_by_the_time_of_sampling_and_never_by_a_wait_that_was_none() -> None:
    groups = [group("a", [info("a", 0, 100), info("a", 1, 300)], [ok(1.0, 0.5), ok(0.0, 1.0)])]
    seconds = {"rollout": 0.002, "update": 1.5, "step": 1.6}

    def rate(*, ahead: bool) -> float:
        report = UpdateReport(5, {}, 1.5)
        out = step_metrics(
            groups, report, None, sampler_stats={}, seconds=seconds, dropped={}, failed={}, untrained={}, ahead=ahead
        )
        return out["throughput/rollout_tokens_per_s"]

    assert rate(ahead=True) == pytest.approx(250)
    assert rate(ahead=False) == pytest.approx(200_000), "then the wait is all the time there was"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_parts_of_a_step_add_up_to_the_whole() -> None:
    clock = Clock()
    keeper = TimeKeeper(clock)
    keeper.start_step()
    with keeper.phase("rollout"):
        clock.now += 2.0
        with keeper.phase("reward"):
            clock.now += 1.0
            with keeper.phase("log"):
                clock.now += 0.25
        clock.now += 0.5
    clock.now += 0.125
    for _ in range(2):
        with keeper.phase("update"):
            clock.now += 4.0
    seconds = keeper.end_step()
    assert seconds == {"rollout": 2.5, "reward": 1.0, "log": 0.25, "update": 8.0, "other": 0.125, "step": 11.875}


def test_a_phase_between_steps_is_measured_and_belongs_to_none() -> None:
    clock = Clock()
    keeper = TimeKeeper(clock)
    with keeper.phase("eval") as spent:
        clock.now += 3.0
    assert spent.seconds == 3.0
    keeper.start_step()
    with keeper.phase("update"):
        clock.now += 1.0
    assert keeper.end_step() == {"update": 1.0, "other": 0.0, "step": 1.0}


def test_a_phase_that_raises_is_still_closed() -> None:
    clock = Clock()
    keeper = TimeKeeper(clock)
    keeper.start_step()

    def fail() -> None:
        with keeper.phase("update"):
            clock.now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with keeper.phase("sync"):
        clock.now += 2.0
    assert keeper.end_step() == {"update": 1.0, "sync": 2.0, "other": 0.0, "step": 3.0}


def test_a_group_with_two_different_steps_has_a_signal_though_its_sums_are_equal() -> None:
    steps = (Step(1, 1.0), Step(3, 0.0))
    scores = [Score(ScoreStatus.OK, 1.0, (RewardScore("r", ScoreStatus.OK, 1.0, steps=steps),), steps=steps)] * 2
    plain = [Score(ScoreStatus.OK, 1.0, (RewardScore("r", ScoreStatus.OK, 1.0),))] * 2
    groups = [group(name, [info(name, 0, 10), info(name, 1, 20)], own) for name, own in (("a", scores), ("b", plain))]
    out = step_metrics(groups, UpdateReport(1, {}, 0.0), None, sampler_stats={}, seconds={}, dropped={}, failed={})
    assert out["groups/no_signal_fraction"] == 0.5
    assert out["reward/mean"] == out["reward/r/mean"] == 1.0
