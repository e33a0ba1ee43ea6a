"""Is the completion, word for word, the answer?"""

from __future__ import annotations

from typing import Any

from grpo_ray.rewards.function import Completions, text_of


def exact_match(completions: Completions, answer: list[Any]) -> list[float | None]:
    """1 if the completion equals column `answer` as a string, white space at both ends aside, else 0; None without such an answer.

    A whole number that a table made a float (12.0, where the column has nulls) is 12 and 12.0. What is no text, number or truth
    value has no string that an answer could equal.

    Range {0, 1}.
    """
    return [_score(text_of(c).strip(), a) for c, a in zip(completions, answer, strict=True)]


def _score(text: str, answer: Any) -> float | None:
    if answer is None or answer != answer or isinstance(answer, dict | list | tuple | set):
        return None
    forms = {str(answer).strip()}
    if isinstance(answer, float) and answer.is_integer():
        forms.add(str(int(answer)))
    return float(text in forms)
