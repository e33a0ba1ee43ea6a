"""A game of several turns for a tiny model: guess a number, and hear whether it is higher or lower.

    user 1-15 -> model 8 -> user higher -> model 12 -> user lower -> model 10: won

Whoever halves what is left always wins with four guesses of fifteen numbers. The demonstrations are of somebody who mostly guesses
at random, and sometimes halves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from grpo_ray.errors import DataError


class GuessNumber:
    """The game, in gymnasium's shape. The reward is 1 for the right number, with the guess that says it."""

    def __init__(self, high: int = 15, max_guesses: int = 4) -> None:
        self._high = high
        self._max_guesses = max_guesses
        self._number = self._guesses = 0

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Begin: the prompt says all that there is to know."""
        self._number = random.Random(seed).randint(1, self._high)
        self._guesses = 0
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Hear about a guess: observation, reward, whether it is won, whether it is lost, nothing."""
        self._guesses += 1
        hint = hint_of(action, self._number)
        return hint, float(hint == "right"), hint == "right", self._guesses >= self._max_guesses, {}


def hint_of(guess: str, number: int) -> str:
    """What is said about a guess."""
    if not (guess.isascii() and guess.isdecimal()):
        return "no number"
    value = int(guess)
    return "right" if value == number else "higher" if value < number else "lower"


def prompts(size: int, high: int = 15) -> Iterator[dict[str, Any]]:
    """Make rows of the game; each has a number of its own, by the seed that its row gives it."""
    for _ in range(size):
        yield {"prompt": question(high)}


def question(high: int) -> str:
    return f"1-{high}"


def flawed_games(
    size: int, seed: int, high: int = 15, max_guesses: int = 4, at_random: float = 0.75
) -> Iterator[dict[str, Any]]:
    """Make demonstrations: a game so far, and the next guess.

    Args:
        at_random: the probability of a guess that pays no attention to what was said; the others halve what is left.

    Raises:
        DataError: it is no probability.
    """
    if not 0 <= at_random <= 1:
        raise DataError(f"flawed_games: at_random is {at_random}, expected a probability between 0 and 1")
    rng = random.Random(seed)
    made = 0
    while made < size:
        for row in _game(rng, high, max_guesses, at_random):
            if made < size:
                yield row
            made += 1


def _game(rng: random.Random, high: int, max_guesses: int, at_random: float) -> Iterator[dict[str, Any]]:
    number = rng.randint(1, high)
    least, most = 1, high
    said = [{"role": "user", "content": question(high)}]
    for _ in range(max_guesses):
        guess = rng.randint(1, high) if rng.random() < at_random else (least + most) // 2
        yield {"prompt": list(said), "completion": str(guess)}
        hint = hint_of(str(guess), number)
        if hint == "right":
            return
        least, most = (max(least, guess + 1), most) if hint == "higher" else (least, min(most, guess - 1))
        said += [{"role": "assistant", "content": str(guess)}, {"role": "user", "content": hint}]
