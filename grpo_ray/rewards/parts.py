"""A completion's two parts: what is thought, and what is told."""

from __future__ import annotations

from typing import Literal

Part = Literal["all", "reasoning", "summary"]
_OPEN, _CLOSE = "<think>", "</think>"


def part_of(text: str, part: Part) -> str:
    """`reasoning` is what stands before the last `</think>`, `summary` what follows it.

    Reasoning that never ends has no summary. A text without such tags is told and not thought: it is all summary, and its
    reasoning, for want of another, the whole too.
    """
    if part == "all":
        return text
    before, closed, after = text.rpartition(_CLOSE)
    if closed:
        return before.lstrip().removeprefix(_OPEN) if part == "reasoning" else after
    if _OPEN in text:
        return text.partition(_OPEN)[2] if part == "reasoning" else ""
    return text
