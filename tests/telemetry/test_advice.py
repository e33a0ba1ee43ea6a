"""The one sentence: named situations with exact numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from grpo_ray.telemetry.advice import StepTimes, advise, mean_step, step_model

# Ten seconds, nothing ahead: 5.9 s of sampling, then 3.7 s of learning, 0.2 s of sync, 0.2 s of the rest.
EVEN = StepTimes(
    step_s=10.0,
    wait_s=5.9,
    update_s=3.7,
    sync_s=0.2,
    log_s=0.1,
    sampling_s=5.9,
    learning_s=3.9,
    scoring_s=1.0,
    scoring_alone_s=0.0,
    num_samplers=1,
    num_learners=1,
    num_scorers=2,
    max_staleness=0,
    shared_devices=False,
)
AHEAD = replace(EVEN, max_staleness=1)


def text(times: StepTimes) -> str:
    advice = advise(times)
    return advice.text if advice else ""


def test_alternating_roles_could_overlap() -> None:
    assert text(EVEN) == (
        "learners idle 61% of the step, sampling is the bottleneck: algorithm.max_staleness=1 would overlap them: at most 1.6x"
    )
    advice = advise(EVEN)
    assert advice is not None
    assert advice.factor == pytest.approx(10 / 6.1), "sampling, and the pause of a sync"


def test_overlap_is_no_advice_where_the_devices_are_shared() -> None:
    assert advise(replace(EVEN, shared_devices=True)) is None


def test_overlap_is_no_advice_where_one_role_is_all_of_the_step() -> None:
    times = replace(EVEN, wait_s=9.5, sampling_s=9.5, update_s=0.3, learning_s=0.3, sync_s=0.1)
    assert text(times) == (
        "sampling takes 95% of the step, and nothing idle could take it over: one worker more (rollout.num_actors=2): "
        "expected 1.9x"
    )


def test_idle_samplers_become_learners() -> None:
    times = replace(
        AHEAD, wait_s=0.0, update_s=9.6, learning_s=9.8, sampling_s=5.9, num_samplers=4, num_learners=2, num_scorers=4
    )
    # Four samplers and two learners: 3 + 3 gives max(7.87 + 0.2, 0.4 + 6.4) = 8.07 s.
    assert text(times) == (
        "samplers idle 41% of the step, the learner is the bottleneck: move workers from rollout to learner "
        "(rollout.num_actors 4 -> 3, learner.num_actors 2 -> 3): expected 1.2x"
    )
    advice = advise(times)
    assert advice is not None
    assert advice.factor == pytest.approx(10 / (5.9 * 4 / 3 + 0.2))


def test_idle_learners_become_samplers() -> None:
    times = replace(AHEAD, wait_s=6.0, sampling_s=9.8, update_s=3.6, learning_s=3.8, num_samplers=4, num_learners=4)
    # 6 + 2: max(6.53 + 0.2, 0.4 + 7.2) = 7.6 s; 5 + 3: max(7.84 + 0.2, 0.4 + 4.8) = 8.04 s.
    assert "move workers from learner to rollout (rollout.num_actors 4 -> 6, learner.num_actors 4 -> 2)" in text(times)
    advice = advise(times)
    assert advice is not None
    assert advice.factor == pytest.approx(10 / 7.6)


def test_a_sampler_of_two_devices_is_moved_whole() -> None:
    times = replace(
        AHEAD, wait_s=0.0, update_s=9.6, learning_s=9.8, sampling_s=3.0, num_samplers=3, num_learners=2,
        devices_per_sampler=2,
    )  # fmt: skip
    assert "rollout.num_actors 3 -> 2, learner.num_actors 2 -> 4" in text(times)


def test_in_turns_the_split_that_makes_the_sum_least() -> None:
    times = replace(EVEN, wait_s=8.0, sampling_s=8.0, update_s=1.6, learning_s=1.8, num_samplers=2, num_learners=6)
    assert step_model(times, ahead=False, samplers=4, learners=4) == pytest.approx(0.4 + 4.0 + 2.4)
    assert step_model(times, ahead=False, samplers=5, learners=3) == pytest.approx(0.4 + 3.2 + 3.2)
    assert "rollout.num_actors 2 -> 4" in text(times)


def test_scoring_that_all_wait_for_asks_for_more_reward_workers() -> None:
    times = replace(EVEN, wait_s=9.0, sampling_s=0.5, scoring_s=8.8, scoring_alone_s=8.5, update_s=0.6, learning_s=0.7)
    assert text(times) == (
        "reward workers busy 88% of the step, 85% of it alone: raise reward.num_actors (2 -> 4): at most 1.7x"
    )
    ahead = replace(AHEAD, wait_s=7.0, sampling_s=3.0, scoring_s=9.7, update_s=2.6, learning_s=2.8)
    assert text(ahead) == (
        "reward workers busy 97% of the step, samplers idle 70%: raise reward.num_actors (2 -> 4): at most 2.0x"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"log_s": 3.0}, "writing samples takes 30% of the step: tracking.rollouts=false would spare it: at most 1.4x"),
        (
            {"sync_s": 4.0},
            "sending weights takes 40% of the step: a larger prompts_per_step would share it among more samples: at most 1.7x",
        ),
    ],
)
def test_what_comes_between_sampling_and_learning(changes: dict[str, Any], expected: str) -> None:
    times = replace(EVEN, wait_s=3.0, sampling_s=3.0, update_s=3.0, learning_s=3.0, shared_devices=True, **changes)
    assert text(times) == expected


def test_nothing_is_said_when_less_than_a_tenth_could_be_won() -> None:
    balanced = replace(
        AHEAD, wait_s=0.5, sampling_s=9.4, update_s=9.1, learning_s=9.3, num_samplers=20, num_learners=20
    )
    assert advise(balanced) is None
    assert advise(replace(EVEN, step_s=0.0)) is None


def line(step: int, **changes: float) -> dict[str, float]:
    own = {
        "step": step, "time/step": 10.0, "time/rollout": 6.0, "time/update": 3.0, "time/sync": 0.5, "time/log": 0.25,
        "busy/rollout": 0.5, "busy/learner": 0.35, "busy/reward": 0.1, "reward/alone_s": 0.5,
        "workers/rollout": 2.0, "workers/learner": 3.0, "workers/reward": 4.0, "workers/shared": 0.0,
    }  # fmt: skip
    return own | changes


def test_the_mean_step_leaves_out_the_first_and_weighs_by_seconds() -> None:
    lines = [{"step": 0, "eval/accuracy": 0.5}, line(1, **{"time/step": 60.0}), line(2), line(3, **{"time/step": 30.0})]
    times = mean_step(lines, {"algorithm": {"max_staleness": 2}, "rollout": {"tensor_parallel_size": 4}})
    assert times == StepTimes(
        step_s=20.0, wait_s=6.0, update_s=3.0, sync_s=0.5, log_s=0.25, sampling_s=10.0, learning_s=7.0, scoring_s=2.0,
        scoring_alone_s=0.5, num_samplers=2, num_learners=3, num_scorers=4, max_staleness=2, shared_devices=False,
        devices_per_sampler=4,
    )  # fmt: skip
    assert mean_step([{"step": 1, "time/step": 1.0}], {}) is None
    assert mean_step([line(1)], {}) is not None
