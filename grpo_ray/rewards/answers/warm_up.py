"""Loading math-verify, and what it loads at its first formulas, outside the time limit of an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from grpo_ray.rewards.answers.cpu_clock import within_cpu_s

T = TypeVar("T")


def within_timeout(timeout_s: float, call: Callable[[], T]) -> T:
    """The result of `call`, within a limit in CPU seconds that starts once math-verify is loaded.

    Raises:
        OutOfTimeError: it took longer.
    """
    warm_up()
    return within_cpu_s(timeout_s, call)


@lru_cache(maxsize=1)
def warm_up() -> None:
    """Parse a formula of each kind: the first builds the parser's tables and imports parts of SymPy, outside any answer's time."""
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        # They warn that their own clocks are off; ours run.
        logging.getLogger(name).setLevel(logging.ERROR)
    for gold, answer in _FIRST_OF_THEIR_KIND.items():
        verify(parse(gold, parsing_timeout=0), parse(answer, parsing_timeout=0), timeout_seconds=0)


_FIRST_OF_THEIR_KIND = {
    r"\boxed{\frac{x}{2}}": "1/2",
    r"\boxed{\frac{3}{4}x^2+1}": r"\boxed{\frac{3x^2+4}{4}}",
    r"\boxed{\int_0^1 x dx}": r"\boxed{\frac{1}{2}}",
    r"\boxed{\sin(\pi/4)}": r"\boxed{\frac{\sqrt2}{2}}",
    r"\boxed{(1, 2]}": r"\boxed{\log_2 8}",
}
