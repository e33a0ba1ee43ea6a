"""A task with a tool for a tiny model: products that it can't compute, and a calculator that can.

    user 58*26 -> model <tool_call>{"name": "calculate", ..}</tool_call> -> tool 1508 -> model 1508

The demonstrations mostly answer at once, with a number from nowhere; the model has to find out that asking pays.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from grpo_ray.errors import DataError

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"*": operator.mul, "+": operator.add, "-": operator.sub}
_EXPRESSION = re.compile(r"\s*(\d{1,9})\s*([*+-])\s*(\d{1,9})\s*", re.ASCII)


def calculate(expression: str) -> int:
    """Calculate a sum, a difference or a product of two numbers.

    Args:
        expression: the two numbers with +, - or * between them.

    Returns:
        The result.
    """
    found = _EXPRESSION.fullmatch(expression)
    if found is None:
        raise ValueError(f"{expression!r} is not two numbers with +, - or * between them")
    return _OPERATIONS[found[2]](int(found[1]), int(found[3]))


def prompts(size: int, seed: int) -> Iterator[dict[str, str]]:
    """Make products of two numbers of two digits: rows {prompt, answer}."""
    rng = random.Random(seed)
    for _ in range(size):
        expression = _product(rng)
        yield {"prompt": expression, "answer": str(calculate(expression))}


def flawed_uses(size: int, seed: int, asks: float = 0.25, copies: float = 0.9) -> Iterator[dict[str, Any]]:
    """Make demonstrations: an answer from nowhere, a call of the calculator, or an answer after one.

    Args:
        asks: the probability that the calculator is called.
        copies: the probability that what is called is what was asked, and that the answer is the calculator's.

    Raises:
        DataError: one of them is no probability.
    """
    for name, value in (("asks", asks), ("copies", copies)):
        if not 0 <= value <= 1:
            raise DataError(f"flawed_uses: {name} is {value}, expected a probability between 0 and 1")
    rng = random.Random(seed)
    for _ in range(size):
        expression = _product(rng)
        asked = [{"role": "user", "content": expression}]
        if rng.random() >= asks:
            yield {"prompt": asked, "completion": str(rng.randint(100, 9801))}
            continue
        said = expression if rng.random() < copies else _product(rng)
        if rng.random() < 0.5:
            yield {"prompt": asked, "completion": _call(said)}
            continue
        result = calculate(said)
        answered = [*asked, {"role": "assistant", "content": _call(said)}, {"role": "tool", "content": str(result)}]
        answer = result if rng.random() < copies else rng.randint(100, 9801)
        yield {"prompt": answered, "completion": str(answer)}


def _product(rng: random.Random) -> str:
    return f"{rng.randint(10, 99)}*{rng.randint(10, 99)}"


def _call(expression: str) -> str:
    """A call as the tiny model's template writes it."""
    return f'<tool_call>{{"name": "calculate", "arguments": {{"expression": "{expression}"}}}}</tool_call>'
