"""Two-digit sums and differences in words, half known to a small pretrained model; the answer has a line of its own.

    Prompt      Mia has 47 shells and finds 25 more. How many shells does Mia have now?
    Completion  47 + 25 = 72
                Answer: 72

Two turns before the question show the form: without them a model of this size writes what it likes, and has nothing to learn from.
Held out are sums and not only texts: no training prompt asks for the result of a held-out one, in whatever words.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from grpo_ray.errors import DataError
from grpo_ray.rewards.exact_match import exact_match
from grpo_ray.rewards.functions.function import Completions, text_of

Row = dict[str, Any]
HELD_OUT = 8
"""The inverse of the fraction of sums that are held out, chosen by their text."""
TWO_DIGITS = range(10, 100)
ASKED = {
    "+": (
        "What is {a} plus {b}?",
        "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
        "There are {a} {things} in one box and {b} {things} in another. How many {things} are there in all?",
        "A shop sells {a} {things} in the morning and {b} {things} in the afternoon. How many {things} does it sell that day?",
    ),
    "-": (
        "What is {a} minus {b}?",
        "{name} has {a} {things} and gives {b} of them away. How many {things} does {name} have left?",
        "There are {a} {things} in a box, and {b} of them are broken. How many {things} are not broken?",
        "{name} needs {a} {things} and has {b} {things}. How many more {things} does {name} need?",
    ),
}
EXAMPLES = (
    ("Sam has 31 plums and finds 12 more. How many plums does Sam have now?", "31 + 12 = 43\nAnswer: 43"),
    ("What is 46 plus 38?", "46 + 38 = 84\nAnswer: 84"),
)
"""The turns before each question."""
NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Zoe", "Max")
THINGS = ("shells", "coins", "books", "apples", "cards", "stamps", "pens", "eggs")
_LINE = re.compile(r"Answer: (0|-?[1-9][0-9]*)")


def prompts(size: int, seed: int, held_out: bool = False, signs: Sequence[str] = tuple(ASKED)) -> Iterator[Row]:
    """Make `size` rows {prompt, question, answer, subject}: `prompt` a conversation that ends with the question, `subject` the sum
    as `47 + 25`. None repeats a subject.

    Args:
        held_out: make rows of the held-out sums instead of the others.
        signs: `+` and `-`, or one of them.

    Raises:
        DataError: there are not as many sums, or a sign is none.
    """
    if not signs or not set(signs) <= set(ASKED):
        raise DataError(f"word_problems has the signs {' and '.join(ASKED)}, and signs is {list(signs)}")
    subjects = [subject for subject in _subjects() if subject[1] in signs and _is_held_out(*subject) == held_out]
    if size > len(subjects):
        raise DataError(f"word_problems has {len(subjects)} {'held-out ' * held_out}sums, and {size} are asked for")
    rng = random.Random(f"word_problems/{seed}")
    for a, sign, b in rng.sample(subjects, size):
        question = rng.choice(ASKED[sign]).format(a=a, b=b, name=rng.choice(NAMES), things=rng.choice(THINGS))
        yield {
            "prompt": _conversation(question),
            "question": question,
            "answer": a + b if sign == "+" else a - b,
            "subject": f"{a} {sign} {b}",
        }


def answer_line(completions: Completions, answer: list[Any]) -> list[float | None]:
    """A reward function: 1 if the last line is `Answer: N` with the right number, and no other line begins so, else 0; None for a
    row without an answer.

    Range {0, 1}.
    """
    numbers = [_number(text_of(completion)) for completion in completions]
    right = exact_match([number or "" for number in numbers], answer)
    return [value and float(number is not None) for value, number in zip(right, numbers, strict=True)]


def answer_form(completions: Completions) -> list[float]:
    """A reward function: 1 for a completion with an answer line, right or wrong, as `answer_line` reads it, else 0.

    Range {0, 1}.
    """
    return [float(_number(text_of(completion)) is not None) for completion in completions]


def _conversation(question: str) -> list[dict[str, str]]:
    turns = [turn for example in EXAMPLES for turn in zip(("user", "assistant"), example, strict=True)]
    return [{"role": role, "content": text} for role, text in (*turns, ("user", question))]


def _number(completion: str) -> str | None:
    """The number of the answer line; None: there is none, or there are several."""
    lines = [line.strip() for line in completion.strip().splitlines()]
    found = _LINE.fullmatch(lines[-1]) if lines else None
    if found is None or sum(line.startswith("Answer:") for line in lines) > 1:
        return None
    return found[1]


def _subjects() -> Iterator[tuple[int, str, int]]:
    for a in TWO_DIGITS:
        for b in TWO_DIGITS:
            yield a, "+", b
            if a >= b:
                yield a, "-", b


def _is_held_out(a: int, sign: str, b: int) -> bool:
    """Whether the sum is held out: with 47 + 25 also 25 + 47."""
    low, high = sorted((a, b))
    return zlib.crc32(f"{low} {sign} {high}".encode()) % HELD_OUT == 0
