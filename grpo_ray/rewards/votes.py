"""Answers that samples of a group share: for majority votes, not for training.

A vote has the contract of a reward function and is called with a whole group, so it runs in reward workers, under the
same deadlines: the value of a completion is the number of its answer, None if it gives none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.answers.cpu_clock import OutOfTimeError
from grpo_ray.rewards.answers.golds import (
    GOLD_TIMES,
    TIMEOUT_S,
    Gold,
    chosen,
    golds_of,
    read_answer,
    read_gold,
    said_words,
)
from grpo_ray.rewards.answers.plain_numbers import Reading
from grpo_ray.rewards.answers.readings import same_value
from grpo_ray.rewards.answers.warm_up import within_timeout
from grpo_ray.rewards.functions.function import Completions, text_of

A = TypeVar("A")


def math_votes(
    completions: Completions,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[float | None]:
    """Votes by the answers that `accuracy` finds; those that math-verify considers equal (1/2 and 0.5) are one."""
    golds = golds_of(answer, solution, len(completions))
    found = [_answer(text_of(c), g, timeout_s) for c, g in zip(completions, golds, strict=True)]
    return number_answers(found, lambda known, answer: _place(known, answer, timeout_s))


def _place(known: Sequence[Reading], answer: Reading, timeout_s: float) -> int | None:
    """The index of the answer among the known ones; numbers come first, compared instantly, formulas in `timeout_s` together."""
    order = sorted(range(len(known)), key=lambda i: (known[i].text != answer.text, known[i].number is None))
    try:
        return within_timeout(
            timeout_s, lambda: next((i for i in order if same_value(known[i], answer, timeout_s)), None)
        )
    except OutOfTimeError:
        return None


def _answer(completion: str, gold: Any, timeout_s: float) -> Reading | None:
    """The answer that is compared with those of other samples: letters and words by their texts, if the gold answer is such."""
    try:
        golds: tuple[Gold, ...] = read_gold(gold, GOLD_TIMES * timeout_s)
    except RewardError:
        golds = ()
    try:
        return within_timeout(timeout_s, lambda: _compared(completion, golds, timeout_s))
    except OutOfTimeError:
        return None


def _compared(completion: str, golds: Sequence[Gold], timeout_s: float) -> Reading | None:
    if any(g.letters for g in golds) and (letters := chosen(completion)):
        return Reading("choice " + " ".join(sorted(letters)), ())
    if any(g.words for g in golds):
        return Reading("words " + said_words(completion)[0], ())
    return read_answer(completion, any(g.marked for g in golds), timeout_s)


def text_votes(completions: Completions) -> list[float | None]:
    """Votes by the text in `<answer>`, else by all that follows `</think>`, ignoring white space and case."""
    texts = [" ".join(answer_of(text_of(c).rpartition("</think>")[2]).casefold().split()) for c in completions]
    places: dict[str, float] = {}
    return [places.setdefault(text, float(len(places))) if text else None for text in texts]


def number_answers(answers: Sequence[A | None], place: Callable[[Sequence[A], A], int | None]) -> list[float | None]:
    """The number of each answer: that of the equal one before it, else a new one.

    Args:
        place: the function that finds the index of an equal answer among distinct ones; None: there is none.
    """
    known: list[A] = []
    numbers: list[float | None] = []
    for answer in answers:
        if answer is None:
            numbers.append(None)
            continue
        number = place(known, answer)
        if number is None:
            number = len(known)
            known.append(answer)
        numbers.append(float(number))
    return numbers
