"""A completion's two parts: what is thought, and what is told."""

from __future__ import annotations

from typing import Literal

from grpo_ray.data.thinking import CLOSE, OPEN

Part = Literal["all", "reasoning", "summary"]


def part_of(text: str, part: Part) -> str:
    """`reasoning` is what stands before the last `</think>`, `summary` what follows it, without the line breaks between, which chat
    templates leave out too (in an empty first paragraph IFEval finds no first word).

    Reasoning that never ends has no summary. A text without such tags is told and not thought: it is all summary, and its
    reasoning, for want of another, the whole too.
    """
    if part == "all":
        return text
    before, closed, after = text.rpartition(CLOSE)
    if closed:
        return before.lstrip().removeprefix(OPEN) if part == "reasoning" else after.lstrip("\n")
    if OPEN in text:
        return text.partition(OPEN)[2] if part == "reasoning" else ""
    return text
