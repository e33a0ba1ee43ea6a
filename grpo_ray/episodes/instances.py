"""Instances of environments, each kind of class behind one interface. They live in the process of the user's code."""

from __future__ import annotations

import asyncio
import inspect
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from grpo_ray.episodes.calls import ToolCall, error_text
from grpo_ray.episodes.contract import (
    REWARD,
    BrokenContractError,
    Interface,
    Stepped,
    content_of,
    finite,
    keywords,
    tool_names,
)

Tools = Mapping[str, Callable[..., Any]]
PROMPT = "prompt"


class Instance(Protocol):
    """One environment, for one episode at a time."""

    made: Any
    """The user's own object, for reward functions that name `environments`; None where there is none."""

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        """Begin an episode. Returns what is appended to the prompt: text, content blocks, messages in its place, or None."""
        ...

    def step(self, action: str) -> Stepped:
        """Play one action of a text game."""
        ...

    def call(self, call: ToolCall) -> tuple[str | list[Any], bool]:
        """Answer one call: the content of the tool's message, and whether it is an error."""
        ...

    def reward(self) -> float | None:
        """The reward at the end of the episode; None: there is none."""
        ...

    def close(self) -> None:
        """Release what the instance holds."""
        ...


class ToolInstance:
    """An instance of TRL's contract, or tools alone (`made` None)."""

    def __init__(self, made: Any, tools: Tools) -> None:
        self.made = made
        own = {name: getattr(made, name) for name in tool_names(type(made))} if made is not None else {}
        self._tools = {**tools, **own}

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        if self.made is None:
            return None
        return awaited(self.made.reset(**keywords(self.made.reset, {"seed": seed, **row})))

    def step(self, _action: str) -> Stepped:
        raise BrokenContractError("an environment of tools has no steps")

    def call(self, call: ToolCall) -> tuple[str | list[Any], bool]:
        if problem := call.problem or self._unknown(call.name):
            return error_text(problem), True
        try:
            return content_of(awaited(self._tools[call.name](**(call.arguments or {})))), False
        except MemoryError:
            raise
        except Exception as e:
            return error_text(_message(e)), True

    def _unknown(self, name: str) -> str:
        return (
            "" if name in self._tools else f"there is no tool {name!r}; there are: {', '.join(self._tools) or 'none'}"
        )

    def reward(self) -> float | None:
        if self.made is None or not hasattr(self.made, REWARD):
            return None
        return finite(awaited(self.made.get_reward()), REWARD)

    def close(self) -> None:
        _close(self.made)


class GymInstance:
    """A text game with gymnasium's `reset` and `step`."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def reset(self, row: dict[str, Any], seed: int) -> Any:
        given = {**row, "seed": seed, "options": row}
        found = awaited(self.made.reset(**keywords(self.made.reset, given)))
        return _text(found[0] if isinstance(found, tuple) else found)

    def step(self, action: str) -> Stepped:
        found = awaited(self.made.step(action))
        if not isinstance(found, tuple) or len(found) not in (4, 5):
            raise BrokenContractError(
                f"step gave {found!r:.80}, expected (observation, reward, terminated, truncated, info)"
            )
        observation, reward, *ends = found[:-1]
        return Stepped(_user(observation), finite(reward, "step"), any(map(bool, ends)))

    def call(self, _call: ToolCall) -> tuple[str | list[Any], bool]:
        raise BrokenContractError("a text game has no tools")

    def reward(self) -> float | None:
        return None

    def close(self) -> None:
        _close(self.made)


class SkyrlInstance(GymInstance):
    """A text game of skyrl-gym, which is made anew for every episode, with the row as `extras`."""

    def __init__(self, make: Callable[..., Any], args: dict[str, Any]) -> None:
        super().__init__(None)
        self._make = make
        self._args = args

    def reset(self, row: dict[str, Any], _seed: int) -> Any:
        self.close()
        self.made = self._make(**{**keywords(self._make, {"extras": row}), **self._args})
        prompt = row.get(PROMPT)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        found = awaited(self.made.init(messages))
        return list(found[0] if isinstance(found, tuple) else found)

    def step(self, action: str) -> Stepped:
        found = awaited(self.made.step(action))
        if not isinstance(found, Mapping):
            raise BrokenContractError(f"step gave {found!r:.80}, expected {{observations, reward, done, metadata}}")
        messages = [dict(m) for m in found.get("observations") or []]
        return Stepped(messages, finite(found.get("reward"), "step"), bool(found.get("done")))

    def close(self) -> None:
        made, self.made = self.made, None
        _close(made)


class TextarenaInstance(GymInstance):
    """A game of textarena for one player."""

    def reset(self, _row: dict[str, Any], seed: int) -> Any:
        awaited(self.made.reset(**keywords(self.made.reset, {"num_players": 1, "seed": seed})))
        return self._observed()

    def step(self, action: str) -> Stepped:
        found = awaited(self.made.step(action))
        done = bool(found[0] if isinstance(found, tuple) else found)
        return Stepped([] if done else _user(self._observed()), None, done)

    def reward(self) -> float | None:
        found = awaited(self.made.close())
        rewards = found[0] if isinstance(found, tuple) else found
        return finite(rewards.get(0) if isinstance(rewards, Mapping) else rewards, "close")

    def close(self) -> None:
        """Do nothing: `close` is where the game gives its rewards."""

    def _observed(self) -> str:
        found = self.made.get_observation()
        return _text(found[1] if isinstance(found, tuple) else found)


def instance_of(interface: Interface, make: Callable[..., Any], args: dict[str, Any], tools: Tools) -> Instance:
    """A new instance of the class."""
    match interface:
        case "tools":
            return ToolInstance(make(**args), tools)
        case "gym":
            return GymInstance(make(**args))
        case "skyrl":
            return SkyrlInstance(make, args)
        case "textarena":
            return TextarenaInstance(make(**args))


def seed_everything(seed: int) -> None:
    """Seed the generators that environments draw from, so that the episodes of a group begin alike."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


_runner: asyncio.Runner | None = None


def awaited(value: Any) -> Any:
    """The value itself, or what it is awaited for, on one event loop for the whole process: sessions that a class keeps belong to
    it."""
    global _runner
    if not inspect.isawaitable(value):
        return value
    if _runner is None:
        _runner = asyncio.Runner()

    async def whole() -> Any:
        return await value

    return _runner.run(whole())


def _user(observation: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": _text(observation)}]


def _text(observation: Any) -> str:
    return observation if isinstance(observation, str) else str(observation)


def _message(error: Exception) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__


def _close(made: Any) -> None:
    close = getattr(made, "close", None)
    if callable(close):
        awaited(close())
