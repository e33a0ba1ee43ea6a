"""Demonstrations of the smoke run: without flaws all right, with flaws as often right as the flaws say."""

from __future__ import annotations

import random
from typing import Any

import pytest
import reasoning_gym

from grpo_ray.errors import DataError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.r1_format import r1_format
from grpo_ray.tasks.arithmetic import Flaws, demonstrate, flawed_demonstrations

pytestmark = pytest.mark.timeout(300)
NONE = Flaws(0, 0, 0)


def entries(size: int, seed: int, digits: int) -> Any:
    return reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=digits, max_digits=digits, size=size, seed=seed
    )


def right(size: int, seed: int, digits: int = 2, **flaws: float) -> list[bool]:
    rows = flawed_demonstrations(size, seed, min_digits=digits, max_digits=digits, **flaws)
    dataset = entries(size, seed, digits)
    out = []
    for row, entry in zip(rows, dataset, strict=True):
        assert row["prompt"] == entry["metadata"]["expression"]
        out.append(dataset.score_answer(answer_of(row["completion"]), entry) == 1.0)
    return out


@pytest.mark.parametrize(
    ("left", "sign", "right_term", "completion"),
    [
        (58, "+", 26, "<think>8+6+0=14,5+2+1=08</think><answer>84</answer>"),
        (97, "+", 97, "<think>7+7+0=14,9+9+1=19</think><answer>194</answer>"),
        (82, "-", 27, "<think>2-7-0=15,8-2-1=05</think><answer>55</answer>"),
        (23, "-", 60, "<think>-(0-3-0=17,6-2-1=03)</think><answer>-37</answer>"),
        (45, "-", 44, "<think>5-4-0=01,4-4-0=00</think><answer>1</answer>"),
        (30, "-", 30, "<think>0-0-0=00,3-3-0=00</think><answer>0</answer>"),
        (3, "-", 9, "<think>-(9-3-0=06)</think><answer>-6</answer>"),
    ],
)
def test_the_working_goes_column_by_column(left: int, sign: str, right_term: int, completion: str) -> None:
    assert demonstrate(left, sign, right_term, NONE, random.Random(1)) == completion


def test_a_forgotten_carry_is_a_zero_in_its_place_and_the_column_is_right_with_it() -> None:
    flaws = Flaws(wrong_column=0.0, forgotten_carry=1.0, broken_format=0.0)
    text = demonstrate(58, "+", 26, flaws, random.Random(1))
    assert text == "<think>8+6+0=14,5+2+0=07</think><answer>74</answer>"


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_clean_demonstrations_are_all_right_by_reasoning_gyms_verifier(digits: int) -> None:
    none = {"wrong_column": 0.0, "forgotten_carry": 0.0, "broken_format": 0.0}
    assert all(right(1500, 7, digits, **none))
    texts = [row["completion"] for row in flawed_demonstrations(1500, 7, digits, digits, **none)]
    assert r1_format(texts) == [1.0] * 1500


def test_forgetting_every_carry_is_wrong_exactly_where_there_is_one() -> None:
    results = right(3000, 11, wrong_column=0.0, forgotten_carry=1.0, broken_format=0.0)
    for ok, entry in zip(results, entries(3000, 11, 2), strict=True):
        left, sign, right_term = entry["metadata"]["expression"].split(" ")
        a, b = sorted((int(left), int(right_term)), reverse=True)
        carries = a % 10 + b % 10 > 9 if sign == "+" else a % 10 < b % 10
        assert ok is not carries, entry["metadata"]["expression"]


def test_the_share_of_right_and_well_formed_demonstrations_follows_the_flaws() -> None:
    size = 6000
    share = sum(right(size, 50_000_000, wrong_column=0.2, forgotten_carry=0.5, broken_format=0.0)) / size
    # A column stays right with 0.8 + 0.2 / 20; half of the 45% with a carry forget it.
    assert share == pytest.approx(0.81**2 * (1 - 0.5 * 0.45), abs=0.03)
    broken = flawed_demonstrations(size, 50_000_000, wrong_column=0.2, forgotten_carry=0.5, broken_format=0.15)
    assert sum(r1_format([row["completion"] for row in broken])) / size == pytest.approx(0.85, abs=0.02)


def test_completions_are_short_and_the_same_in_every_run() -> None:
    rows = list(flawed_demonstrations(500, 3))
    assert rows == list(flawed_demonstrations(500, 3))
    assert max(len(row["completion"]) for row in rows) <= 56
    assert rows != list(flawed_demonstrations(500, 4))


def test_a_flaw_that_is_no_probability_is_refused() -> None:
    with pytest.raises(DataError, match=r"forgotten_carry is 65, expected a probability between 0 and 1"):
        list(flawed_demonstrations(1, 1, forgotten_carry=65))
