"""Calling reward functions and checking their results. Whatever a function does short of ending the process becomes a typed result;
a failure is a status, never a zero."""

from __future__ import annotations

import asyncio
import inspect
import math
import operator
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from grpo_ray.errors import RewardError, kind_and_line
from grpo_ray.rewards.functions.function import Explained, RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.logs import CallLog, Plain
from grpo_ray.types import RewardScore, Score, ScoreStatus, Step

MAX_DETAIL_CHARS = 500
_runner: asyncio.Runner | None = None


def call_reward(function: RewardFunction, inputs: ScoreInputs) -> list[RewardScore]:
    """The results [S] of one function, `not_applicable` where it does not apply. It never raises, except KeyboardInterrupt."""
    start = time.perf_counter()
    try:
        rows = function.applies_to(inputs)
        asked = inputs.take(rows, function.part, with_opening=function.built_in)
        log = CallLog(function.name, len(rows))
        values = function.call(**function.keywords(asked, log)) if rows else []
        if inspect.isawaitable(values):
            values = _run(values)
        if isinstance(values, Iterator):
            # TRL accepts any iterable; an endless one is read only as far as it takes to refuse it.
            values = list(islice(values, len(rows) + 1))
        extras = log.extras()
    except KeyboardInterrupt:
        raise
    except BaseException as e:  # SystemExit too: a reward function may not end the run
        detail = explain(e) + _hint(e, inputs)
        return failures(function.name, len(inputs), ScoreStatus.ERROR, detail, time.perf_counter() - start)
    checked = check_values(function.name, values, asked.lengths, time.perf_counter() - start)
    results = dict(zip(rows, map(_with_extra, checked, extras), strict=True))
    if log.metrics:
        results[rows[0]] = replace(results[rows[0]], logged=log.metrics)
    other = RewardScore(function.name, ScoreStatus.NOT_APPLICABLE, math.nan)
    return [results.get(i, other) for i in range(len(inputs))]


def _with_extra(score: RewardScore, extra: tuple[tuple[str, Plain], ...]) -> RewardScore:
    return replace(score, extra=extra) if extra else score


def _hint(error: BaseException, inputs: ScoreInputs) -> str:
    """The fix, if it is known: for memory, and for `completion[0]["content"]`, which TRL's users know from conversations."""
    if isinstance(error, MemoryError):
        return "; a scoring process may take reward.memory_gb: raise that, or let the function take less"
    if not (isinstance(error, TypeError) and "string indices" in str(error) and isinstance(inputs.completions[0], str)):
        return ""
    return (
        "; completions are text where the row's prompt is text: use c, or make the column `prompt` a list of messages"
    )


def check_values(name: str, values: Any, lengths: Sequence[int], seconds: float) -> list[RewardScore]:
    """The results from a returned list.

    None -> not_applicable; numbers (bool, numpy and torch scalars too) and lists of steps -> ok; a RewardError -> error, with its
    text; NaN, infinities and anything else -> error. A list of the wrong length is an error for all of them.

    Args:
        lengths: T of each completion, which bounds the ends of steps.
    """
    expected = len(lengths)
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        detail = f"reward {name!r} returned {type(values).__name__}, expected a list of {expected} numbers or None"
        return failures(name, expected, ScoreStatus.ERROR, detail, seconds)
    if len(values) != expected:
        detail = f"reward {name!r} returned {len(values)} values, expected {expected}, one for each completion"
        return failures(name, expected, ScoreStatus.ERROR, detail, seconds)
    return [
        _check_value(name, value, length, seconds / max(expected, 1))
        for value, length in zip(values, lengths, strict=True)
    ]


def _check_value(name: str, value: Any, length: int, seconds: float) -> RewardScore:
    if value is None:
        return RewardScore(name, ScoreStatus.NOT_APPLICABLE, math.nan, seconds=seconds)
    if isinstance(value, RewardError):
        return failures(name, 1, ScoreStatus.ERROR, str(value), seconds)[0]
    steps: list[Step] = []
    try:
        if isinstance(value, list | tuple):
            steps = _check_steps(value, length)
            number = sum(step.value for step in steps)
        else:
            number = _finite(value)
    except _WrongValue as e:
        detail = (
            f"reward {name!r} returned {_short(value)}, expected a finite number, None for 'does not apply', or a list of "
            f"(end, reward), one for each step{e}"
        )
        return failures(name, 1, ScoreStatus.ERROR, detail, seconds)[0]
    detail = value.detail[:MAX_DETAIL_CHARS] if isinstance(value, Explained) else ""
    return RewardScore(name, ScoreStatus.OK, number, detail, seconds, tuple(steps))


class _WrongValue(Exception):
    """An invalid list of steps; its text is the cause, to be put at the end of a sentence."""


def _finite(value: Any) -> float:
    try:
        # float("0.5") works, but a reward that is a string is a mistake somewhere else.
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise _WrongValue
    return number


def _check_steps(value: Sequence[Any], length: int) -> list[Step]:
    """The checked steps `[(end, reward), ..]` of a completion of `length` tokens: ends ascend, and the last is one of its
    tokens."""
    if not value:
        raise _WrongValue(": there is none")
    steps: list[Step] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _WrongValue
        try:
            end = -1 if isinstance(pair[0], bool) else operator.index(pair[0])
        except TypeError:
            end = -1
        first = steps[-1].end + 1 if steps else 0
        if not first <= end < length:
            raise _WrongValue(
                f": step {len(steps)} ends at {_short(pair[0])}, expected the index of a token from {first} to {length - 1}, the "
                "last one of this completion"
            )
        steps.append(Step(end, _finite(pair[1])))
    return steps


def failures(name: str, count: int, status: ScoreStatus, detail: str, seconds: float) -> list[RewardScore]:
    """`count` results with the same failure."""
    return [
        RewardScore(name, status, math.nan, detail[:MAX_DETAIL_CHARS], seconds / max(count, 1)) for _ in range(count)
    ]


def weighted_sum(parts: Sequence[RewardScore], weights: Sequence[float], num_tokens: int) -> Score:
    """The score sum_k weight_k * value_k over the parts that apply (TRL's `reward_weights`); a failed part fails the whole.

    Steps of several functions are pooled; those that end at the same of the completion's `num_tokens` tokens are one step.
    """
    failed = next((part for part in parts if part.status.failed), None)
    if failed is not None:
        return Score(failed.status, math.nan, tuple(parts), failed.detail)
    applying = [(p, w) for p, w in zip(parts, weights, strict=True) if p.status is ScoreStatus.OK]
    if not applying:
        return Score(ScoreStatus.NOT_APPLICABLE, math.nan, tuple(parts), "no reward function applies to this sample")
    value = sum(part.value * weight for part, weight in applying)
    if not any(part.steps for part, _ in applying):
        return Score(ScoreStatus.OK, value, tuple(parts))
    pooled: dict[int, float] = {}
    for part, weight in applying:
        for step in part.steps or (Step(num_tokens - 1, part.value),):
            pooled[step.end] = pooled.get(step.end, 0.0) + step.value * weight
    return Score(ScoreStatus.OK, value, tuple(parts), steps=tuple(Step(end, pooled[end]) for end in sorted(pooled)))


def _run(awaitable: Any) -> Any:
    """The result of an awaitable, on one event loop for the whole process, because sessions that an async function keeps (HTTP
    clients) belong to a loop."""
    global _runner
    if _runner is None:
        _runner = asyncio.Runner()

    async def whole() -> Any:
        return await awaitable

    return _runner.run(whole())


def explain(error: BaseException) -> str:
    """The error as `ValueError: no digits (rewards.py:12)`: type, first line, and the innermost line of the user's code."""
    try:
        message = kind_and_line(error)
    except Exception:
        message = f"{type(error).__name__}: (its message can't be printed)"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})" if len(frames) > 1 else ""
    return f"{message[: MAX_DETAIL_CHARS - 100]}{where}"


def _short(value: Any) -> str:
    try:
        return repr(value)[:80]
    except Exception:
        return f"a {type(value).__name__}"
