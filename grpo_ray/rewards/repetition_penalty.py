"""A penalty for repetition."""

from __future__ import annotations

from collections.abc import Sequence

from grpo_ray.errors import RewardError


def repetition_penalty(completion_ids: list[list[int]], ngram_size: int = 3, max_penalty: float = -1.0) -> list[float]:
    """max_penalty * (1 - distinct n-grams / n-grams) over the completion's tokens; 0 for fewer than `ngram_size` tokens.

    One token 300 times scores -(1 - 1/298) = -0.9966.

    Range (max_penalty, 0]. Source: "Demystifying Long Chain-of-Thought Reasoning" (2502.03373), appendix C.2, over tokens as
    there and in TRL's `get_repetition_penalty_reward`. (Open-R1 counts words, of which Chinese text has one.)

    Raises:
        RewardError: `max_penalty` is positive, or `ngram_size` below 1.
    """
    if max_penalty > 0 or ngram_size < 1:
        raise RewardError(
            f"reward 'repetition_penalty': got ngram_size {ngram_size} and max_penalty {max_penalty}; "
            "expected at least 1, and at most 0 (a penalty is negative)"
        )
    return [_penalty(ids, ngram_size, max_penalty) for ids in completion_ids]


def _penalty(ids: Sequence[int], ngram_size: int, max_penalty: float) -> float:
    total = len(ids) - ngram_size + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(ids[i : i + ngram_size]) for i in range(total)})
    return max_penalty * (1 - distinct / total) if distinct < total else 0.0
