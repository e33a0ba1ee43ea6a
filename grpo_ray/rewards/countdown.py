"""The reward of Countdown: reach a target with given numbers."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.functions.function import Completions, text_of

MAX_CHARS = 200
_DIGITS = re.compile(r"\s*[-+]?[0-9]{1,50}(?:[./][0-9]{1,50})?\s*")
# No powers: 9**9**9 exceeds any memory. The rest grows at most with the length of the text.
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def countdown(completions: Completions, target: list[Any], nums: list[Any], format_score: float = 0.0) -> list[float]:
    """1 if the answer is an expression that uses each of `nums` exactly once and equals `target`; else 0.

    The expression is what `<answer>` holds, else the whole completion; `+ - * / ( )` over whole numbers, computed in
    exact fractions; `= target` may follow. `format_score` is for a readable expression that is wrong (TinyZero gives its 0.1 to
    any `<answer>`, readable or not).

    Range {0, format_score, 1}. Source: TinyZero's countdown reward, without its `eval`, and so without its powers and `//`.

    Raises:
        RewardError: the row's target or one of its numbers is no number.
    """
    return [
        _score(answer_of(text_of(c)), t, numbers, format_score)
        for c, t, numbers in zip(completions, target, nums, strict=True)
    ]


def _score(answer: str, target: Any, numbers: Any, format_score: float) -> float:
    expression, equals, result = answer.partition("=")
    goal, given = _exact(target), sorted(map(_exact, numbers))
    try:
        value, used = evaluate(expression)
        stated = evaluate(result)[0] if equals else goal
    except ValueError:
        return 0.0
    right = value == goal and stated == goal and sorted(used) == given
    return 1.0 if right else format_score


def check_row(row: Mapping[str, Any]) -> None:
    """Raises RewardError for a row whose target or numbers are no numbers, so that no answer to it can be scored."""
    if row.get("target") is not None and row.get("nums") is not None:
        numbers = row["nums"] if isinstance(row["nums"], Iterable) else [row["nums"]]
        for number in (row["target"], *numbers):
            _exact(number)


def _exact(number: Any) -> Fraction:
    """The exact value of a row's number, given as a number or as digits. (Fraction itself would expand `1e999999999`.)"""
    try:
        if not isinstance(number, str) or _DIGITS.fullmatch(number):
            return Fraction(number)
    except (TypeError, ValueError, ArithmeticError):
        pass
    raise RewardError(f"reward 'countdown': {str(number)[:80]!r} in column target or nums is no number")


def evaluate(expression: str) -> tuple[Fraction, list[Fraction]]:
    """The exact value of an arithmetic expression, and the numbers in it.

    Raises:
        ValueError: it is longer than MAX_CHARS, not arithmetic, or divides by zero.
    """
    text = expression.strip()
    if len(text) > MAX_CHARS:
        raise ValueError(f"{len(text)} characters, at most {MAX_CHARS}")
    used: list[Fraction] = []
    try:
        tree = ast.parse(text, mode="eval")
        return _value(tree.body, used), used
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as e:
        raise ValueError(f"not arithmetic: {type(e).__name__}") from None


def _value(node: ast.expr, used: list[Fraction]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            used.append(Fraction(number))
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, used)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, used)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, used), _value(right, used))
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
