"""Adapter for verl's reward functions, which run here unchanged.

    compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float | bool | dict with "score"

is called for each sample by keyword, as by verl's `NaiveRewardManager`; it is recognised by `solution_str`. With the parameter
`solution_strs` it is verl's batched form (`BatchRewardManager`): lists under the plural names, a list back. Either may be `async`.

    data_source    the row's column of that name
    solution_str   the completion's text
    ground_truth   of the column `reward_model` its entry `ground_truth`; else the column `ground_truth`, else `answer`;
                   if a row has none of them the sample fails
    extra_info     the row's column, {} without one

The entries of a dict besides `score` are logged: all of them with the sample, numbers as metrics too (`logged/NAME`).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import (
    Completions,
    RewardFunction,
    has_value,
    inspect_function,
    text_of,
    value_of,
)
from grpo_ray.rewards.functions.logs import plain
from grpo_ray.rewards.functions.scoring import explain

GROUND_TRUTH = ("reward_model.ground_truth", "ground_truth", "answer")
_TRUTH_COLUMNS = tuple(name.partition(".")[0] for name in GROUND_TRUTH)
_SINGULAR = ("data_source", "solution_str", "ground_truth", "extra_info")
_PLURAL = ("data_sources", "solution_strs", "ground_truths", "extra_infos")
_MANAGER_ONLY = ("reward_router_address", "reward_model_tokenizer")


def is_verl(call: Callable[..., Any]) -> bool:
    """Whether it has verl's signature, by the name of its text parameter."""
    try:
        names = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return False
    return not {_SINGULAR[1], _PLURAL[1]}.isdisjoint(names) and "completions" not in names


def verl_function(name: str, call: Callable[..., Any], weight: float, args: dict[str, Any]) -> RewardFunction:
    """verl's function behind this project's contract; `args` are verl's `reward_kwargs`.

    Raises:
        RewardError: it does not take the `args`, or has parameters that nothing fills.
    """
    batched = _PLURAL[1] in inspect.signature(call).parameters
    brought = _PLURAL if batched else _SINGULAR
    taken = next((k for k in args if k in brought), None)
    if taken is not None:
        raise RewardError(
            f"reward {name!r}: args can't hold {taken!r}, which every call gets from the sample; remove it"
        )
    own = inspect_function(name, call, weight, args)
    lacking = next((names[0] for names in own.required if names[0] not in brought), None)
    if lacking is not None:
        why = "which verl's reward loop alone passes" if lacking in _MANAGER_ONLY else "which verl does not pass"
        raise RewardError(
            f"reward {name!r} requires {lacking!r}, {why}; give it in args, or give that parameter a default"
        )
    accepted = [k for k in brought if own.accepts is None or k in own.accepts]
    required = [(_SINGULAR[0],)] * (brought[0] in accepted) + [GROUND_TRUTH] * (brought[2] in accepted)
    adapter = _batched if batched else _one_by_one

    def score(
        completions: Completions, log_extra: Callable[..., None], log_metric: Callable[..., None], **columns: Any
    ) -> Any:
        rows = zip(
            columns.get(_SINGULAR[0]) or [None] * len(completions),
            map(text_of, completions),
            [_ground_truth(name, columns, i) if brought[2] in accepted else None for i in range(len(completions))],
            [{} if info is None else info for info in columns.get(_SINGULAR[3]) or [None] * len(completions)],
            strict=True,
        )
        results = adapter(call, [dict(zip(brought, row, strict=True)) for row in rows], accepted, args)
        if inspect.isawaitable(results):
            return _then(results, log_extra, log_metric)
        return _values(results, log_extra, log_metric)

    return RewardFunction(name, score, weight, required=tuple(required), per_sample=not batched)


def _one_by_one(
    call: Callable[..., Any], rows: list[dict[str, Any]], accepted: Sequence[str], args: dict[str, Any]
) -> list[Any] | Awaitable[list[Any]]:
    """The results of single calls, one for each sample; a RewardError if the call raises."""
    results = [_lacking(row) or _tried(call, {k: row[k] for k in accepted} | args) for row in rows]
    return _all(results) if any(map(inspect.isawaitable, results)) else results


def _lacking(row: Mapping[str, Any]) -> RewardError | None:
    return next((value for value in row.values() if isinstance(value, RewardError)), None)


def _tried(call: Callable[..., Any], keywords: dict[str, Any]) -> Any:
    try:
        return call(**keywords)
    except Exception as e:
        return RewardError(explain(e))


async def _all(results: list[Any]) -> list[Any]:
    async def one(result: Any) -> Any:
        try:
            return await result if inspect.isawaitable(result) else result
        except Exception as e:
            return RewardError(explain(e))

    return list(await asyncio.gather(*map(one, results)))


def _batched(
    call: Callable[..., Any], rows: list[dict[str, Any]], accepted: Sequence[str], args: dict[str, Any]
) -> Any:
    if error := next(filter(None, map(_lacking, rows)), None):
        raise error
    return call(**{k: [row[k] for row in rows] for k in accepted}, **args)


async def _then(results: Awaitable[Any], log_extra: Callable[..., None], log_metric: Callable[..., None]) -> Any:
    return _values(await results, log_extra, log_metric)


def _values(results: Any, log_extra: Callable[..., None], log_metric: Callable[..., None]) -> Any:
    """The rewards; the rest of each dict is logged."""
    if hasattr(results, "tolist"):
        results = results.tolist()
    if not isinstance(results, list | tuple):
        return results
    dicts = [result if isinstance(result, Mapping) else {} for result in results]
    for key in dict.fromkeys(key for entries in dicts for key in entries if key != "score"):
        log_extra(str(key), [entries.get(key) for entries in dicts])
        for entries in dicts:
            if isinstance(number := plain(entries.get(key)), bool | int | float):
                log_metric(str(key), number)
    return [_value(result) for result in results]


def _value(result: Any) -> Any:
    if not isinstance(result, Mapping):
        return result
    if "score" not in result:
        return RewardError(
            f"it returned a dict without 'score'; it has {', '.join(map(str, result))[:200] or 'nothing'}"
        )
    return result["score"]


def _ground_truth(reward: str, columns: Mapping[str, Sequence[Any]], i: int) -> Any:
    """The ground truth of row i; None if the row has a null, a RewardError if it has no entry for one (verl raises a KeyError)."""
    row = {name: columns[name][i] for name in _TRUTH_COLUMNS if name in columns}
    found = next((value for name in GROUND_TRUTH if (value := value_of(row, name)) is not None), None)
    if found is not None or any(has_value(row, name) for name in GROUND_TRUTH):
        return found
    return RewardError(
        f"reward {reward!r}: the row's column 'reward_model' is {row.get('reward_model')!r:.80}, expected a mapping with "
        "'ground_truth'; or map a column that holds the truth: data.train.columns: {ground_truth: NAME}"
    )
