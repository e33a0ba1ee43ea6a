"""Explanations of why a reward function does not apply to a sample, with the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.answers.golds import gold_of
from grpo_ray.rewards.functions.function import SOURCE

QUOTED = 60
"""The number of characters of a value that a message shows."""


def why_not_applicable(function: RewardFunctionConfig, columns: Mapping[str, Any], step: int | None) -> str:
    """Explain why the function does not apply to a row.

    Args:
        columns: the columns of the row.
        step: the number of steps done when its prompt was dispatched; None in an evaluation.
    """
    name = function.title
    if step is not None and step < function.from_step:
        return f"{name} begins at step {function.from_step + 1} (its from_step is {function.from_step})"
    if function.sources and columns.get(SOURCE) not in function.sources:
        return (
            f"{name} is for the sources {', '.join(function.sources)}, and here column {SOURCE} is {quoted(columns.get(SOURCE))}: "
            "correct its sources, or the column"
        )
    column, gold = gold_of(columns)
    if function.name == "accuracy" and column:
        return (
            f"{name} can't read the right answers of column {column} as mathematics, e.g. {quoted(gold)}: for words use the "
            "reward exact_match or one of your own, or map the column that holds the answers"
        )
    there = ", ".join(sorted(map(str, columns))) or "none"
    return f"{name} returned None, 'does not apply'; it was given the columns {there}: see what it expects there"


def quoted(value: Any) -> str:
    """A value of a data set, shortened to fit in a message."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"
