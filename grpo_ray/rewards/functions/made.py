"""Rewards that are created before they are called: classes, and functions that return one (TRL's `get_cosine_scaled_reward`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from grpo_ray.errors import RewardError, kind_and_line
from grpo_ray.rewards.functions.function import NOT_COLUMNS

_FROM_SAMPLES = NOT_COLUMNS | {"environments", "solution_str", "solution_strs"}


def made(name: str, found: Callable[..., Any], args: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The reward itself and the rest of `args`: a class and a maker are called once, with all of them.

    Raises:
        RewardError: it does not take or refuses the `args`, or is a class whose instances can't be called.
    """
    if isinstance(found, type):
        can_be_called = any("__call__" in vars(base) for base in found.__mro__)
    elif is_maker(found, args):
        can_be_called = True
    else:
        return found, args
    if not can_be_called:
        raise RewardError(no_call(name))
    try:
        reward = found(**args)
    except Exception as e:
        raise RewardError(f"reward {name!r} can't be made with args {args!r:.200}: {kind_and_line(e)}") from None
    return (reward, {}) if callable(reward) else (found, args)


def no_call(name: str) -> str:
    return f"reward {name!r} is a class whose instances can't be called; give it a method __call__(self, completions, **columns)"


def is_maker(found: Callable[..., Any], args: dict[str, Any]) -> bool:
    """Whether it takes no data of samples, and all parameters that it requires are in `args`."""
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return False
    if inspect.iscoroutinefunction(found) or any(
        p.kind is p.VAR_KEYWORD or p.name in _FROM_SAMPLES for p in parameters
    ):
        return False
    return all(p.default is not p.empty or p.name in args or p.kind is p.VAR_POSITIONAL for p in parameters)
