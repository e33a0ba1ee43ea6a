"""Environments of users for the tests: TRL's contract, games of three shapes, and some that misbehave."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHARED: list[str] = []
"""What every instance of one process can reach."""


class Counter:
    """TRL's contract: tools that count."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self.total = start

    def reset(self, **kwargs: Any) -> str | None:
        self.total = self._start
        return kwargs.get("hint")

    def add(self, number: int) -> int:
        """Add to the total.

        Args:
            number: what to add.

        Returns:
            The new total.
        """
        self.total += number
        return self.total

    async def add_slowly(self, number: int) -> str:
        """Add to the total, asynchronously.

        Args:
            number: what to add.

        Returns:
            The new total.
        """
        await asyncio.sleep(0.01)
        return str(self.add(number))

    def fail(self) -> str:
        """Raise.

        Returns:
            Nothing.
        """
        raise ValueError("out of luck")

    def leave(self) -> str:
        """End the process.

        Returns:
            Nothing.
        """
        sys.exit(3)

    async def get_reward(self) -> float:
        return float(self.total)


class Tells:
    """A tool that says what its row holds."""

    def reset(self, said: Any, **kwargs: Any) -> None:
        self._said = said

    def ask(self, question: str) -> Any:
        """Ask.

        Args:
            question: anything.

        Returns:
            What the row holds.
        """
        return f"{self._said} to {question}" if isinstance(self._said, str) else self._said


class Guess:
    """A gym-like game: guess a number from 0 to 9."""

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self.number = random.Random(seed).randrange(10)
        return "guess", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action.strip() == str(self.number)
        return "right" if right else "wrong", float(right), right, False, {}


class Dice:
    """A start that is drawn from Python's own generator."""

    def reset(self, **kwargs: Any) -> str:
        return str(random.random())


class Skyrl:
    """A game of skyrl-gym's shape."""

    def __init__(self, extras: dict[str, Any] | None = None) -> None:
        self.wanted = (extras or {}).get("answer", "yes")

    def init(self, prompt: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [*prompt[:-1], {"role": "user", "content": "say it"}], {}

    def step(self, action: str) -> dict[str, Any]:
        right = action == self.wanted
        return {
            "observations": [] if right else [{"role": "user", "content": "no"}],
            "reward": float(right),
            "done": right,
            "metadata": {},
        }


class Arena:
    """A game of textarena's shape for one player."""

    def reset(self, num_players: int, seed: int | None = None) -> None:
        self.moves: list[str] = []

    def get_observation(self) -> tuple[int, str]:
        return 0, f"move {len(self.moves)}"

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.moves.append(action)
        return len(self.moves) == 2, {}

    def close(self) -> tuple[dict[int, float], dict[str, Any]]:
        return {0: float(self.moves == ["a", "b"])}, {}


class Misbehaves:
    """Does what its row says, in `reset`, in a step or at the end."""

    def reset(self, **kwargs: Any) -> str:
        self._row = kwargs
        self._do("reset")
        return "go"

    def act(self) -> str:
        """Act.

        Returns:
            What came of it.
        """
        self._do("act")
        return "acted"

    def get_reward(self) -> Any:
        return self._do("reward") or 1.0

    def _do(self, place: str) -> Any:
        match self._row.get(place):
            case "hang":
                time.sleep(600)
            case "raise":
                raise RuntimeError("broken")
            case "exit":
                os._exit(7)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fork":
                subprocess.Popen(["sleep", "600"], start_new_session=True)
            case "nan":
                return float("nan")
            case "memory":
                return bytearray(1 << 36)
        return None


class Shared:
    """Keeps what it is given in a module's list."""

    def reset(self, name: str = "", **kwargs: Any) -> str:
        SHARED.append(name)
        return ",".join(SHARED)


class Closes:
    """Writes a file when it is closed."""

    def reset(self, path: str = "", **kwargs: Any) -> None:
        self.path = path

    def close(self) -> None:
        Path(self.path).write_text("closed")


def double(number: int) -> int:
    """Double a number.

    Args:
        number: the number.

    Returns:
        Twice the number.
    """
    return 2 * number


def total_of(completions: list[Any], environments: list[Any], **kwargs: Any) -> list[float]:
    """A reward beside the environments."""
    return [float(e.total) / 10 for e in environments]


class Rounds:
    """A gym-like game that says how often it was answered, and ends after so many rounds."""

    def __init__(self, rounds: int = 5) -> None:
        self._rounds = rounds

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        self._played = 0
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._played += 1
        return f"{self._played} of {self._rounds}", 1.0, self._played >= self._rounds, False, {}
