"""Tool calls in what the model writes: text -> calls, and a call's arguments as they are passed on.

A call that can be read but not made (no name, arguments that are no object) is answered with an error, like an unknown tool. Text
that announces a call and can't be read at all ends the episode as `parse_error`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from grpo_ray import json_text
from grpo_ray.episodes.contract import readable

HERMES = "hermes"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call as the model wrote it."""

    name: str
    arguments: Any
    """What stands in the place of the arguments; an object where the model did as it was told."""

    @property
    def message(self) -> dict[str, Any]:
        """The call as an assistant's message holds it, in `tool_calls`."""
        arguments = self.arguments if isinstance(self.arguments, dict) else {}
        return {"type": "function", "function": {"name": self.name, "arguments": arguments}}

    @property
    def problem(self) -> str:
        """Why the call can't be made, for the model to read; empty if it can."""
        if not self.name:
            return "the call names no tool"
        if self.arguments is not None and not isinstance(self.arguments, dict):
            return f"the arguments of {self.name} are {_kind(self.arguments)}, expected an object"
        return ""


@dataclass(frozen=True)
class Turn:
    """A text of the model, taken apart."""

    content: str
    """What stands before the first call."""
    calls: tuple[ToolCall, ...] = ()
    broken: bool = False
    """Whether it announces a call that can't be read."""

    @property
    def message(self) -> dict[str, Any]:
        """The text as an assistant's message."""
        calls = {"tool_calls": [call.message for call in self.calls]} if self.calls else {}
        return {"role": "assistant", "content": self.content, **calls}


ReadCalls = Callable[[str], Turn]


def no_calls(text: str) -> Turn:
    """Take a text as it is, where there are no tools."""
    return Turn(text)


def read_hermes(text: str) -> Turn:
    """Read calls as Hermes and Qwen write them: `<tool_call>{"name": .., "arguments": {..}}</tool_call>`."""
    bodies = _CALL.findall(text)
    if not bodies:
        return Turn(text)
    content = text[: text.index("<tool_call>")].rstrip()
    try:
        found = [json_text.read(body) for body in bodies]
        calls = tuple(call_of(one.get("name"), one.get("arguments", {})) for one in found)
    # No JSON, or no object.
    except (ValueError, AttributeError):
        return Turn(text, broken=True)
    return Turn(content, calls)


def call_of(name: Any, arguments: Any) -> ToolCall:
    """The call that a parser found; many give the arguments as JSON text.

    Raises:
        ValueError: the arguments are nested too deeply to be sent between processes.
    """
    unpacked = _unpacked(arguments)
    json_text.check_depth(unpacked)
    return ToolCall(_name(name), readable(unpacked))


def error_text(problem: str) -> str:
    """An error as the model reads it, TRL's `{"error": ..}`."""
    return json.dumps({"error": problem}, ensure_ascii=False)


def shortened(text: str, limit: int | None) -> str:
    """The text, cut to so many characters; the cut is said in it."""
    if limit is None or len(text) <= limit:
        return text
    return f"{text[:limit]}\n[cut: {len(text) - limit} of {len(text)} characters are left out]"


def _name(name: Any) -> str:
    return readable(name) if isinstance(name, str) else ""


def _unpacked(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json_text.read(arguments) if arguments.strip() else {}
    except ValueError:
        return arguments


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}.get(
        type(value), type(value).__name__
    )
