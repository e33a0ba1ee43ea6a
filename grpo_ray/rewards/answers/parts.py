"""The two parts of a completion: reasoning and summary."""

from __future__ import annotations

from typing import Literal

from grpo_ray.data.thinking import CLOSE, OPEN

Part = Literal["all", "reasoning", "summary"]


def part_of(text: str, part: Part) -> str:
    """The part of a text: `reasoning` is what precedes the last `</think>`, `summary` what follows it, without the line breaks
    between, which chat templates leave out too (in an empty first paragraph IFEval finds no first word).

    Reasoning that never ends has no summary. A text without such tags is all summary, and, for want of another, its reasoning is
    the whole text too.
    """
    if part == "all":
        return text
    before, closed, after = text.rpartition(CLOSE)
    if closed:
        return before.lstrip().removeprefix(OPEN) if part == "reasoning" else after.lstrip("\n")
    if OPEN in text:
        return text.partition(OPEN)[2] if part == "reasoning" else ""
    return text
