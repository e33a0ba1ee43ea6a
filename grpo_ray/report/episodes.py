"""An episode turn by turn, from a row of the rollout log: what the model wrote, what the environment answered, and the rewards of
turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_ray import json_text


@dataclass(frozen=True)
class Turn:
    who: str
    """`model`, `environment`, or the name of the tool whose result it is."""
    text: str
    rewards: list[tuple[str, float]] = field(default_factory=list)
    """(reward function, value) pairs of steps that end in this turn of the model."""

    @property
    def by_model(self) -> bool:
        return self.who == "model"


def turns_of(row: Mapping[str, Any]) -> list[Turn]:
    """The turns of an episode; none for a single answer."""
    messages = json_text.read(row["turns"]) if row.get("turns") else []
    turns = [Turn(_who(message), _text(message)) for message in messages]
    by_model = [turn for turn in turns if turn.by_model]
    starts = _starts(row["versions"])
    for part in row["rewards"]:
        for step in part["steps"]:
            place = sum(start <= step["end"] for start in starts) - 1
            if 0 <= place < len(by_model):
                by_model[place].rewards.append((part["name"], step["value"]))
    return turns


def _starts(versions: Sequence[Mapping[str, int]]) -> list[int]:
    """Where each turn of the model begins: versions follow each other within a turn, and leave a gap between two."""
    ends = [None, *(span["end"] for span in versions)]
    return [span["start"] for span, before in zip(versions, ends, strict=False) if span["start"] != before]


def _who(message: Mapping[str, Any]) -> str:
    if message["role"] == "assistant":
        return "model"
    return str(message.get("name") or "tool") if message["role"] == "tool" else "environment"


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    calls = [_call(call.get("function", call)) for call in message.get("tool_calls") or ()]
    return "\n".join([text, *calls] if text else calls)


def _call(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    return f"{function.get('name')}({arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)})"
