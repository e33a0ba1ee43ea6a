"""Word problems: their answers are those of the numbers in them, held-out sums are never trained, and one form of answer counts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from grpo_ray.config.schema import RunConfig
from grpo_ray.data.sources import load_table
from grpo_ray.errors import DataError
from grpo_ray.rewards.table import resolve
from grpo_ray.tasks.word_problems import ASKED, EXAMPLES, answer_form, answer_line, prompts
from launch.run.recipe import load_recipe


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(prompts(9000, 1))


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, Any]]:
    return list(prompts(1200, 2, held_out=True))


def test_the_answer_is_the_sum_or_difference_of_the_two_numbers_in_the_prompt(rows: list[dict[str, Any]]) -> None:
    plus, minus = (
        [re.sub(r"\{\w+\}", ".+", re.escape(t).replace(r"\{", "{").replace(r"\}", "}")) for t in ASKED[s]] for s in "+-"
    )
    for row in rows:
        a, b = numbers(row["question"])
        assert 10 <= a < 100
        assert 10 <= b < 100
        added = any(re.fullmatch(text, row["question"]) for text in plus)
        taken = any(re.fullmatch(text, row["question"]) for text in minus)
        assert added is not taken
        assert row["answer"] == (a + b if added else a - b)
        assert row["subject"] == f"{a} {'+' if added else '-'} {b}"
        assert row["answer"] >= 0


def test_every_wording_is_asked_and_no_sum_twice(rows: list[dict[str, Any]]) -> None:
    shapes = {
        re.sub(r"\d+|[A-Z][a-z]{2}\b|\b(shells|coins|books|apples|cards|stamps|pens|eggs)\b", "_", r["question"])
        for r in rows
    }
    assert len(shapes) == sum(map(len, ASKED.values()))
    assert len({row["subject"] for row in rows}) == len(rows)


def test_no_training_prompt_asks_for_a_held_out_sum_in_either_order(
    rows: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> None:
    def asked(row: dict[str, Any]) -> tuple[str, ...]:
        a, sign, b = row["subject"].split()
        return (sign, *sorted((a, b)))

    assert {asked(row) for row in rows}.isdisjoint({asked(row) for row in held_out})
    assert len({row["question"] for row in held_out}) == len(held_out)


def test_each_prompt_shows_the_form_by_right_examples_of_sums_that_are_not_held_out(
    held_out: list[dict[str, Any]],
) -> None:
    conversation = held_out[0]["prompt"]
    assert [turn["role"] for turn in conversation] == ["user", "assistant"] * len(EXAMPLES) + ["user"]
    assert conversation[-1]["content"] == held_out[0]["question"]
    for question, completion in EXAMPLES:
        a, b = numbers(question)
        assert answer_line([completion], [a + b]) == [1.0]
        assert f"{a} + {b}" not in {row["subject"] for row in held_out}


def test_the_recipe_trains_and_measures_on_sums_that_it_keeps_apart_by_rewards_that_it_may_name() -> None:
    config = load_recipe(RunConfig, "arithmetic_smollm2", [])
    assert [resolve(function).name for function in config.reward.functions] == ["answer", "form"]
    train, (held_out,) = config.data.train, config.data.eval_sets.values()
    sums = [{row["subject"] for row in load_table(source, seed=1).rows} for source in (train, held_out)]
    assert sums[0].isdisjoint(sums[1])
    assert len(sums[0]) >= config.prompts_per_step * (config.num_steps or 0)
    assert len(sums[1]) >= 128
    assert config.eval.accuracy == "answer"


def test_a_recipe_may_ask_for_sums_or_differences_alone() -> None:
    for sign in "+-":
        assert {row["subject"].split()[1] for row in prompts(100, 1, signs=[sign])} == {sign}
    for signs in ([], ["*"], ["+", "x"]):
        with pytest.raises(DataError, match=r"word_problems has the signs \+ and -, and signs is "):
            list(prompts(1, 1, signs=signs))


def test_the_same_seed_makes_the_same_rows_and_another_one_others() -> None:
    assert list(prompts(50, 3)) == list(prompts(50, 3))
    assert list(prompts(50, 3)) != list(prompts(50, 4))


def test_more_sums_than_there_are_are_refused_with_their_number() -> None:
    with pytest.raises(DataError, match=r"word_problems has \d+ held-out sums, and 5000 are asked for"):
        list(prompts(5000, 1, held_out=True))


@pytest.mark.parametrize(
    ("completion", "right", "form"),
    [
        ("Mia has 47 + 25 = 72 shells.\nAnswer: 72", 1, 1),
        ("Answer: 72", 1, 1),
        ("Answer: 72\n\n", 1, 1),
        ("47 + 25 = 72\n  Answer: 72 ", 1, 1),
        ("Answer: 71", 0, 1),
        ("Answer: -72", 0, 1),
        ("72", 0, 0),
        ("The answer is 72.", 0, 0),
        ("Answer: 72.", 0, 0),
        ("Answer: 72 shells", 0, 0),
        ("Answer: 072", 0, 0),
        ("Answer: 72.0", 0, 0),
        ("answer: 72", 0, 0),
        ("**Answer: 72**", 0, 0),
        ("Answer:72", 0, 0),
        ("Answer: 72\nThat is all.", 0, 0),
        ("Answer: 70\nAnswer: 71\nAnswer: 72", 0, 0),
        ("Answer: 71 or\nAnswer: 72", 0, 0),
        ("Answer: \uff17\uff12", 0, 0),
        ("Answer: 7" + "2" * 5000, 0, 1),
        ("Answer: ", 0, 0),
        ("", 0, 0),
        ("\n\n", 0, 0),
    ],
)
def test_one_form_of_answer_counts_and_the_right_number_in_it(completion: str, right: float, form: float) -> None:
    assert answer_line([completion], [72]) == [right]
    assert answer_form([completion]) == [form]


def test_golds_of_any_type_are_numbers_and_rows_without_one_are_not_scored() -> None:
    said = "Answer: 0"
    assert answer_line([said] * 5, [0, "0", 0.0, None, ""]) == [1.0, 1.0, 1.0, None, 0.0]
    assert answer_line(["nothing"], [""]) == [0.0]
