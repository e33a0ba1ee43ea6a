"""The reward for a completion that equals the answer word for word."""

from __future__ import annotations

from typing import Any

from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.functions.function import Completions, text_of


def exact_match(completions: Completions, answer: list[Any], in_answer_tag: bool = False) -> list[float | None]:
    """1 if the completion equals column `answer` as a string, white space at both ends aside, else 0; None without such an answer.

    `in_answer_tag`: the content of its last `<answer>...</answer>` is compared; the whole completion if there is none.

    A whole number that a table made a float (12.0, if the column has nulls) equals 12 and 12.0. What is no text, number or truth
    value has no string that an answer could equal.

    Range {0, 1}.
    """
    texts = (answer_of(text) if in_answer_tag else text.strip() for text in map(text_of, completions))
    return [_score(text, a) for text, a in zip(texts, answer, strict=True)]


def _score(text: str, answer: Any) -> float | None:
    if answer is None or answer != answer or isinstance(answer, dict | list | tuple | set):
        return None
    forms = {str(answer).strip()}
    if isinstance(answer, float) and answer.is_integer():
        forms.add(str(int(answer)))
    return float(text in forms)
