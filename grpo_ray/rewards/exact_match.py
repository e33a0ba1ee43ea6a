"""Is the completion, word for word, the answer?"""

from __future__ import annotations

from typing import Any

from grpo_ray.rewards.function import Completions, text_of


def exact_match(completions: Completions, answer: list[Any]) -> list[float]:
    """1 if the completion equals column `answer` as a string, white space at both ends aside, else 0.

    Range {0, 1}.
    """
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]
