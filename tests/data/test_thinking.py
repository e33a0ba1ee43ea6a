"""Thinking that the prompt's template opens is the completion's own, for rewards, filters and demonstrations."""

from __future__ import annotations

from typing import Any

import pytest

from actors.reward.actor import build_inputs
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.datagen.filters.config import FilterConfig, SampledSource
from grpo_ray.datagen.filters.select import select
from grpo_ray.datagen.filters.trace import first_fault, trace_of
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.types import SampleInfo, ScoreRequest
from tests.samples import row as sample_row

PERFECT = "<think>2+2</think><answer>4</answer>"
CUT = PERFECT.removeprefix("<think>")


def score(name: str, completion: str, opened: bool = False, **config: Any) -> float:
    info = SampleInfo("d/0/0", 0, 1, 3, 0, "stop", "rollout-0", [completion], 0)
    request = ScoreRequest(info, "q<think>\n" if opened else "q", None, {"answer": "4"})
    inputs = build_inputs([request], {id(info.ref): info.ref})
    (result,) = call_reward(resolve(RewardFunctionConfig(name=name, **config)), inputs)
    return result.value


@pytest.mark.parametrize("name", ["r1_format", "think_format", "accuracy", "exact_match"])
@pytest.mark.parametrize("text", [PERFECT, "<think>2+2", "<think>2<think>2</think>4", "<think></think>4"])
def test_a_built_in_reward_gives_the_same_whoever_opens_the_thinking(name: str, text: str) -> None:
    for part in ("all", "summary"):
        assert score(name, text.removeprefix("<think>"), opened=True, part=part) == score(name, text, part=part)


def test_a_completion_that_opens_the_thinking_a_second_time_has_not_the_form() -> None:
    assert [score(n, PERFECT, opened=True) for n in ("r1_format", "think_format")] == [0.0, 0.0]
    assert [score("r1_format", t, o, args={"prefilled": True}) for t, o in ((CUT, False), (CUT, True))] == [1.0, 1.0]


def seen(completions: list[str], **_: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def test_a_function_of_ones_own_sees_what_was_sampled_and_of_a_part_what_it_is() -> None:
    def length(text: str, **config: Any) -> float:
        return score("tests.data.test_thinking.seen", text, opened=True, **config)

    assert length(CUT) == len(CUT)
    assert length(CUT, part="reasoning") == len("2+2")
    assert length("unfinished", part="reasoning") == len("unfinished")
    assert length("unfinished", part="summary") == 0


# What is made of samples


def test_filters_and_demonstrations_take_an_opened_thinking_as_the_sample_s() -> None:
    opened = sample_row("p/0/0", 0, CUT) | {"prompt": "q<think>\n"}
    closed = sample_row("p/0/0", 0, PERFECT) | {"prompt": "q"}
    for form in ("think", "r1"):
        config = FilterConfig(form=form)
        assert first_fault(trace_of(opened), config) is first_fault(trace_of(closed), config) is None
        assert first_fault(trace_of(opened | {"prompt": "q"}), config) == "form"
    (row,) = select([opened | {"columns": {"tools": [{"name": "add"}]}}], SampledSource(path="x"), seed=1).rows
    assert row["completion"] == [{"role": "assistant", "content": PERFECT}]
    assert row["tools"] == [{"name": "add"}]
