"""A fee for saying the same thing again."""

from __future__ import annotations

from grpo_ray.errors import RewardError
from grpo_ray.rewards.function import Completions, text_of


def repetition_penalty(completions: Completions, ngram_size: int = 3, max_penalty: float = -1.0) -> list[float]:
    """max_penalty * (1 - distinct n-grams / n-grams) over lower-case words; 0 for fewer than `ngram_size` words.

    Range (max_penalty, 0]. Source: "Demystifying Long Chain-of-Thought Reasoning" (2502.03373), appendix C.2, as
    TRL and Open-R1 have it.

    Raises:
        RewardError: a positive `max_penalty`, or `ngram_size` below 1.
    """
    if max_penalty > 0 or ngram_size < 1:
        raise RewardError(
            f"reward 'repetition_penalty': got ngram_size {ngram_size} and max_penalty {max_penalty}; "
            "expected at least 1, and at most 0 (a penalty is negative)"
        )
    return [_penalty(text_of(c), ngram_size, max_penalty) for c in completions]


def _penalty(text: str, ngram_size: int, max_penalty: float) -> float:
    words = text.lower().split()
    ngrams = list(zip(*(words[i:] for i in range(ngram_size)), strict=False))
    if not ngrams:
        return 0.0
    return max_penalty * (1 - len(set(ngrams)) / len(ngrams))
