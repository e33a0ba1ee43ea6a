"""The answers of a scoring process, read without trusting them: code of the user ran beside the writer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from actors.reward.pipe import EndedError
from grpo_ray.rewards.functions.logs import MAX_COLUMNS, MAX_METRICS, checked_name, plain
from grpo_ray.types import LoggedMetric, RewardScore, ScoreStatus, Step


def encode(result: RewardScore) -> list[Any]:
    """The result as [status, value, detail, seconds, [[end, value], ..]], then extras and metrics where it logs some; NaN has no
    JSON."""
    said: list[Any] = [
        result.status.value,
        result.value if result.status is ScoreStatus.OK else None,
        result.detail,
        result.seconds,
        [[step.end, step.value] for step in result.steps],
    ]
    return [*said, result.extra, result.logged] if result.extra or result.logged else said


def decode(name: str, lengths: Sequence[int], message: dict[str, Any]) -> list[RewardScore]:
    """The scores of the function `name` for samples of these lengths.

    Raises:
        EndedError: the answer is not one that a function can have given.
    """
    try:
        scores = [
            RewardScore(
                name,
                ScoreStatus(status),
                math.nan if value is None else float(value),
                str(detail),
                float(seconds),
                tuple(Step(int(end), float(reward)) for end, reward in steps),
                *_logs(*logs),
            )
            for status, value, detail, seconds, steps, *logs in message["scores"]
        ]
    except (KeyError, TypeError, ValueError):
        raise EndedError from None
    if len(scores) != len(lengths) or not all(map(_possible, scores, lengths)):
        raise EndedError
    return scores


def _logs(extra: Any = (), metrics: Any = ()) -> tuple[tuple[Any, ...], tuple[LoggedMetric, ...]]:
    """What a function logged beside a score; raises ValueError or TypeError."""
    pairs = tuple((checked_name(column), plain(value)) for column, value in extra)
    logged = tuple(
        LoggedMetric(checked_name(n), float(total), int(count), int(odd)) for n, total, count, odd in metrics
    )
    if len(pairs) > MAX_COLUMNS or len(logged) > MAX_METRICS or not all(math.isfinite(m.total) for m in logged):
        raise ValueError("more than a function can log")
    return pairs, logged


def _possible(score: RewardScore, length: int) -> bool:
    ends = [-1, *(step.end for step in score.steps), length]
    ok = score.status is ScoreStatus.OK
    return (
        math.isfinite(score.value) == ok
        and all(math.isfinite(step.value) for step in score.steps)
        and (not score.steps or (ok and all(a < b for a, b in pairwise(ends))))
    )
