"""Demonstrations for the smoke run: two-term sums and differences worked column by column, with deliberate flaws.

    Prompt      58 + 26
    Completion  <think>8+6+0=14,5+2+1=08</think><answer>84</answer>

Columns go from the units up. `8+6+0=14` is digit + digit + carry = carry out, digit; `0-3-0=17` is digit - digit -
borrow = borrow out, digit. A negative difference is computed the other way round inside `-(...)`:

    Prompt      23 - 60
    Completion  <think>-(0-3-0=17,6-2-1=03)</think><answer>-37</answer>

A model that imitates the flaws is right in about a third of its samples, and every step that it needs to improve is one that it
already takes sometimes: what reinforcement learning requires of a cold start.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from grpo_ray.errors import DataError


@dataclass(frozen=True)
class Flaws:
    """Rates of the flaws in demonstrations, each a probability in [0, 1]."""

    wrong_column: float = 0.12
    """The probability, per column, that its result is random."""
    forgotten_carry: float = 0.8
    """The probability, per column with a carry (or borrow), that 0 is written for it and the column computed with that. Above
    0.5 it is a habit: the likeliest continuation, so that greedy decoding is wrong wherever there is a carry."""
    broken_format: float = 0.12
    """The probability, per demonstration, that a tag is missing."""


def flawed_demonstrations(
    size: int,
    seed: int,
    min_digits: int = 2,
    max_digits: int = 2,
    wrong_column: float = Flaws.wrong_column,
    forgotten_carry: float = Flaws.forgotten_carry,
    broken_format: float = Flaws.broken_format,
) -> Iterator[dict[str, str]]:
    """Make rows {prompt, completion} over two-term `chain_sum` of reasoning-gym; the prompt is its `metadata.expression`.

    `chain_sum` generates row i from the seed `seed + i`: two sets are independent only if their seeds are further apart
    than their sizes.

    Raises:
        DataError: a probability is outside [0, 1].
    """
    flaws = Flaws(wrong_column, forgotten_carry, broken_format)
    for name, value in vars(flaws).items():
        if not 0 <= value <= 1:
            raise DataError(f"flawed_demonstrations: {name} is {value}, expected a probability between 0 and 1")
    import reasoning_gym

    rng = random.Random(seed)
    for row in reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=min_digits, max_digits=max_digits, size=size, seed=seed
    ):
        expression = row["metadata"]["expression"]
        left, sign, right = expression.split(" ")
        yield {"prompt": expression, "completion": demonstrate(int(left), sign, int(right), flaws, rng)}


def demonstrate(left: int, sign: str, right: int, flaws: Flaws, rng: random.Random) -> str:
    """The completion for `left sign right` (both >= 0, sign `+` or `-`)."""
    swapped = sign == "-" and left < right
    upper, lower = (right, left) if swapped else (left, right)
    width = max(len(str(upper)), len(str(lower)))
    columns: list[str] = []
    digits = ""
    carry = 0
    for a, b in zip(str(upper).zfill(width)[::-1], str(lower).zfill(width)[::-1], strict=True):
        used = 0 if carry and rng.random() < flaws.forgotten_carry else carry
        if rng.random() < flaws.wrong_column:
            carry_out, digit = rng.randrange(2), rng.randrange(10)
        elif sign == "+":
            carry_out, digit = divmod(int(a) + int(b) + used, 10)
        else:
            borrowed, digit = divmod(int(a) - int(b) - used, 10)
            carry_out = -borrowed
        columns.append(f"{a}{sign}{b}{sign}{used}={carry_out}{digit}")
        digits = f"{digit}{digits}"
        carry = carry_out
    if sign == "+":
        digits = f"{carry}{digits}"
    working = ",".join(columns)
    answer = str(int(digits))
    if swapped:
        working, answer = f"-({working})", f"-{answer}"
    if rng.random() < flaws.broken_format:
        return rng.choice(
            (
                f"<think>{working}</think>{answer}",
                f"{working}<answer>{answer}</answer>",
                f"<think>{working}<answer>{answer}</answer>",
                f"<think>{working}</think><answer>{answer}",
            )
        )
    return f"<think>{working}</think><answer>{answer}</answer>"
