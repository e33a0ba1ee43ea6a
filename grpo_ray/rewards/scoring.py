"""Call reward functions and judge what they give back. Whatever a function does short of ending the process becomes a
typed result; a failure is a status, never a zero."""

from __future__ import annotations

import asyncio
import inspect
import math
import time
import traceback
from collections.abc import Sequence
from typing import Any

from grpo_ray.rewards.function import RewardFunction, ScoreInputs
from grpo_ray.types import RewardScore, Score, ScoreStatus

MAX_DETAIL_CHARS = 500
_runner: asyncio.Runner | None = None


def score_samples(functions: Sequence[RewardFunction], inputs: ScoreInputs) -> list[Score]:
    """Score S samples with every function, in this process: no deadline, no protection.

    Async functions run on an event loop of our own, so this can't be called from inside a running one.
    """
    parts_by_function = [call_reward(function, inputs) for function in functions]
    return [
        weighted_sum([parts[s] for parts in parts_by_function], [f.weight for f in functions])
        for s in range(len(inputs))
    ]


def call_reward(function: RewardFunction, inputs: ScoreInputs) -> list[RewardScore]:
    """[S] results of one function. Never raises, except KeyboardInterrupt."""
    start = time.perf_counter()
    try:
        values = function.call(**function.keywords(inputs))
        if inspect.isawaitable(values):
            values = _run(values)
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit too: a reward function may not end the run
        return failures(function.name, len(inputs), ScoreStatus.ERROR, _explain(e), time.perf_counter() - start)
    return check_values(function.name, values, len(inputs), time.perf_counter() - start)


def check_values(name: str, values: Any, expected: int, seconds: float) -> list[RewardScore]:
    """Turn a returned list into results.

    None -> not_applicable; numbers (bool, numpy and torch scalars too) -> ok; NaN, infinities and anything else ->
    error. A list of the wrong length is an error for all of them.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        detail = f"reward {name!r} returned {type(values).__name__}, expected a list of {expected} numbers or None"
        return failures(name, expected, ScoreStatus.ERROR, detail, seconds)
    if len(values) != expected:
        detail = f"reward {name!r} returned {len(values)} values, expected {expected}, one for each completion"
        return failures(name, expected, ScoreStatus.ERROR, detail, seconds)
    return [_check_value(name, value, seconds / max(expected, 1)) for value in values]


def _check_value(name: str, value: Any, seconds: float) -> RewardScore:
    if value is None:
        return RewardScore(name, ScoreStatus.NOT_APPLICABLE, math.nan, seconds=seconds)
    try:
        # float("0.5") works, but a reward that is a string is a mistake somewhere else.
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        detail = f"reward {name!r} returned {_short(value)}, expected a finite number, or None for 'does not apply'"
        return failures(name, 1, ScoreStatus.ERROR, detail, seconds)[0]
    return RewardScore(name, ScoreStatus.OK, number, seconds=seconds)


def failures(name: str, count: int, status: ScoreStatus, detail: str, seconds: float) -> list[RewardScore]:
    """`count` results that say the same failure."""
    return [
        RewardScore(name, status, math.nan, detail[:MAX_DETAIL_CHARS], seconds / max(count, 1)) for _ in range(count)
    ]


def weighted_sum(parts: Sequence[RewardScore], weights: Sequence[float]) -> Score:
    """sum_k weight_k * value_k over the parts that apply (TRL's `reward_weights`); a failed part fails the whole."""
    failed = next((part for part in parts if part.status.failed), None)
    if failed is not None:
        return Score(failed.status, math.nan, tuple(parts), failed.detail)
    applying = [(p.value, w) for p, w in zip(parts, weights, strict=True) if p.status is ScoreStatus.OK]
    if not applying:
        return Score(ScoreStatus.NOT_APPLICABLE, math.nan, tuple(parts), "no reward function applies to this sample")
    return Score(ScoreStatus.OK, sum(value * weight for value, weight in applying), tuple(parts))


def _run(awaitable: Any) -> Any:
    """On one loop for the whole process: sessions that an async function keeps (HTTP clients) belong to a loop."""
    global _runner
    if _runner is None:
        _runner = asyncio.Runner()

    async def whole() -> Any:
        return await awaitable

    return _runner.run(whole())


def _explain(error: BaseException) -> str:
    """`ValueError: no digits (rewards.py:12)`: type, first line, and the innermost line of the user's code."""
    try:
        message = (str(error).splitlines() or [""])[0]
    except Exception:
        message = "(its message can't be printed)"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{type(error).__name__}: {message[: MAX_DETAIL_CHARS - 100]}{where}"


def _short(value: Any) -> str:
    try:
        return repr(value)[:80]
    except Exception:
        return f"a {type(value).__name__}"
