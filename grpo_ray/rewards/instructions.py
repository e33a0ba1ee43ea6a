"""The reward for verifiable instructions, in IFEval's words (2311.07911): its data sets, and similar ones, work as they are.

A row states them in two columns: `instruction_id_list`, e.g. [length_constraints:number_words], and `kwargs`, one dict each, e.g.
[{num_words: 100, relation: at least}]. The verdicts are those of IFEval's own checker, strict and not loose: `instruction_checks`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, get_type_hints

from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import Completions, Conversation, text_of
from grpo_ray.rewards.instruction_checks import CHECKS

MAX_NUMBER = 1_000_000_000
"""The largest number for anything that is counted in a text."""


def instructions(
    completions: Completions,
    instruction_id_list: list[Sequence[str]],
    kwargs: list[Sequence[dict[str, Any] | None]],
    prompts: Completions,
    strict: bool = False,
) -> list[float | None]:
    """The fraction of the row's instructions that the completion follows; `strict`: 1 if it follows all, else 0. None without any.

    A blank completion follows none. Use it with `part: summary` for models that think first. An instruction `repeat_prompt` without
    `prompt_to_repeat` is about the row's prompt.

    Range [0, 1]; strict: {0, 1}. Source: IFEval (2311.07911), its 25 instructions, prompt-level strict accuracy.

    Raises:
        RewardError: an instruction is unknown, lacks an argument (where IFEval samples one) or does not take one.
    """
    rows = zip(completions, prompts, instruction_id_list, kwargs, strict=True)
    return [_score(text_of(c), p, ids, args, strict) for c, p, ids, args in rows]


def _score(
    text: str,
    prompt: str | Conversation,
    ids: Sequence[str],
    arguments: Sequence[dict[str, Any] | None],
    strict: bool,
) -> float | None:
    if not ids:
        return None
    if not _is_list_of(ids, str) or not _is_list_of(arguments, dict | None) or len(ids) != len(arguments):
        raise RewardError(
            f"reward 'instructions': instruction_id_list is {_shown(ids, 80)} and kwargs {_shown(arguments, 80)}; expected two "
            "lists of the same length, of names and of mappings"
        )
    kept = [_keeps(text, instruction, args or {}, prompt) for instruction, args in zip(ids, arguments, strict=True)]
    return float(all(kept)) if strict else sum(kept) / len(kept)


def _is_list_of(value: Any, kind: Any) -> bool:
    return (
        not isinstance(value, str | dict)
        and isinstance(value, Iterable)
        and all(isinstance(one, kind) for one in value)
    )


def _shown(value: Any, length: int) -> str:
    try:
        return f"{value!r:.{length}}"
    except ValueError:
        return "a number of thousands of digits"


def _keeps(text: str, instruction: str, arguments: dict[str, Any], prompt: str | Conversation) -> bool:
    check = CHECKS.get(instruction)
    if check is None:
        raise RewardError(f"reward 'instructions': no instruction {instruction!r}; known are {', '.join(CHECKS)}")
    # Arrow gives every row the arguments of all instructions, most of them null; pandas turns null into NaN.
    given = {name: value for name, value in arguments.items() if value is not None and value == value}
    if instruction == "combination:repeat_prompt" and "prompt_to_repeat" not in given:
        given["prompt_to_repeat"] = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    try:
        # Arguments are checked for blank texts too: a wrong argument is the row's fault.
        return check(text, **_read_arguments(check, given)) and bool(text.strip())
    except RewardError as e:
        raise RewardError(f"reward 'instructions': {instruction} {e}; its arguments are {_shown(given, 200)}") from None


@lru_cache(maxsize=len(CHECKS))
def _parameters(check: Callable[..., bool]) -> dict[str, Any]:
    """The parameters of a check, except the text: name -> type."""
    types = get_type_hints(check)
    return {name: types[name] for name in inspect.signature(check).parameters if name != "text"}


def _read_arguments(check: Callable[..., bool], given: dict[str, Any]) -> dict[str, Any]:
    takes = _parameters(check)
    if lacking := [name for name in takes if name not in given]:
        raise RewardError(f"lacks its argument {lacking[0]!r}")
    if unknown := [name for name in given if name not in takes]:
        raise RewardError(f"takes no argument {unknown[0]!r}, but {', '.join(takes) or 'none'}")
    return {name: _read(name, given[name], kind) for name, kind in takes.items()}


def _read(name: str, value: Any, kind: Any) -> Any:
    """The value of an argument; a number that pandas made a float is whole again."""
    if kind is int:
        try:
            number = -1 if isinstance(value, bool) else int(value)
        except (TypeError, ValueError, OverflowError):
            number = -1
        if 0 <= number <= MAX_NUMBER and number == (int(value) if isinstance(value, str) else value):
            return number
        raise RewardError(
            f"can't be checked: {name} is {_shown(value, 60)}, expected a whole number from 0 to {MAX_NUMBER:,}"
        )
    if kind is str:
        if isinstance(value, str) and value.strip():
            return value
        raise RewardError(f"can't be checked: {name} is {_shown(value, 60)}, expected a text")
    if isinstance(value, list | tuple) and value and all(isinstance(word, str) and word for word in value):
        return list(value)
    raise RewardError(f"can't be checked: {name} is {_shown(value, 60)}, expected a list of words")
