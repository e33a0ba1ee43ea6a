"""The contract of environments, as users write them. Nothing of it has to be imported.

TRL's class, unchanged (`interface: tools`): `reset(**row) -> str | list | None`, whose text is appended to the prompt's last
message; every other public method is a tool, with type hints and a docstring; `get_reward() -> float`. `close()`, where there is
one, is called before the process ends. Methods may be async. An instance is made once and reset often.

Text games, whose observation is the next user message, and whose step may have a reward:

    gym         reset(seed=..) -> (observation, info)      step(action) -> (observation, reward, terminated, truncated, info)
    skyrl       init(prompt) -> (messages, metadata)       step(action) -> {observations, reward, done, metadata}
    textarena   reset(num_players, seed); get_observation() -> (player, text); step(action) -> (done, info); close() -> rewards
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from grpo_ray.data.plain_text import whole_characters
from grpo_ray.errors import RewardError

Interface = Literal["tools", "gym", "skyrl", "textarena"]
NO_TOOLS = frozenset({"reset", "get_reward", "close"})
REWARD = "get_reward"


class BrokenContractError(RewardError):
    """An environment that breaks its contract; says how."""


@dataclass(frozen=True)
class Stepped:
    """What a text game answers to one action."""

    messages: list[dict[str, Any]]
    reward: float | None
    done: bool


def interface_of(cls: Any, asked: str, name: str) -> Interface:
    """How instances of the class are played.

    Raises:
        BrokenContractError: it lacks a method that it needs.
    """
    found: Interface = asked if asked != "auto" else _guessed(cls)  # type: ignore[assignment]
    needed = {
        "tools": ("reset",),
        "gym": ("reset", "step"),
        "skyrl": ("init", "step"),
        "textarena": ("reset", "get_observation", "step"),
    }[found]
    if lacking := [method for method in needed if not callable(getattr(cls, method, None))]:
        raise BrokenContractError(
            f"environment {name!r} has no method {lacking[0]!r}, which interface {found} needs; add it, or name another class"
        )
    return found


def _guessed(cls: Any) -> Interface:
    has = {method for method in ("init", "reset", "step", "get_observation") if callable(getattr(cls, method, None))}
    if {"init", "step"} <= has and "reset" not in has:
        return "skyrl"
    if {"reset", "step", "get_observation"} <= has:
        return "textarena"
    return "gym" if "step" in has and _is_gym(cls) else "tools"


def _is_gym(cls: Any) -> bool:
    """Whether it is gymnasium's kind: by its spaces, or by a `reset` that takes a seed, as TRL's never does."""
    if hasattr(cls, "observation_space") or any(
        base.__module__.partition(".")[0] in ("gym", "gymnasium") for base in cls.__mro__
    ):
        return True
    return "seed" in _parameters(cls.reset)


def tool_names(cls: Any) -> list[str]:
    """The names of the tools of a class: its public methods, those of its bases included."""
    found = inspect.getmembers(cls, predicate=inspect.isfunction)
    return [name for name, _ in found if not name.startswith("_") and name not in NO_TOOLS]


def keywords(method: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that the method takes; all, if it takes any."""
    parameters = _parameters(method)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _parameters(method: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(method).parameters)
    except (TypeError, ValueError):
        return {}


def finite(value: Any, what: str) -> float | None:
    """A reward as a number; None stands for none.

    Raises:
        BrokenContractError: it is no finite number.
    """
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BrokenContractError(f"{what} gave {value!r:.80}, expected a finite number or None")
    return number


def content_of(result: Any) -> str | list[Any]:
    """What a tool returned, as the content of its message: a list passes as content blocks, all else as text."""
    return result if isinstance(result, list) else str(result)


def readable(value: Any) -> Any:
    """What an environment sent, with every text as a tokenizer takes it: lone surrogates, of which the model's own JSON may be the
    source, become `\ufffd`."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [readable(item) for item in value]
    return {name: readable(item) for name, item in value.items()} if isinstance(value, dict) else value
