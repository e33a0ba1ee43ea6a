"""The start timeout of workers: rollout engines, reward workers, learner ranks and scoring processes alike.

A start that takes far longer than those before it hangs, or there is no room for the worker: it is retried with twice the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RESTART_S, RESTART_FACTOR = 30.0, 5.0
"""A start that replaces a worker may take this many seconds, and this many times the longest start so far."""


class StartTimeout:
    """How many seconds the starts of one kind of worker may take; the first one takes up to `limit_s`."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self.longest_s = 0.0
        """The longest start so far; 0 before the first."""
        self._clock = clock
        self._died_at = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Time the block, which is a start; it counts unless it raises."""
        began = self._clock()
        yield
        self.longest_s = max(self.longest_s, self._clock() - began)

    def died(self) -> None:
        """Reset the time in which a worker has to start: one died, or its start failed."""
        self._died_at = self._clock()

    @property
    def again_s(self) -> float:
        """The limit in seconds of a start that replaces a worker; beyond it the start hangs."""
        if not self.longest_s:
            return self.limit_s
        return min(self.limit_s, RESTART_S + RESTART_FACTOR * self.longest_s)

    def doubled(self, seconds: float) -> float:
        """The timeout of the next start, after one that hung for `seconds`."""
        return min(2 * seconds, self.limit_s)

    @property
    def left_s(self) -> float:
        """The seconds until a pool without any worker is given up."""
        return self._died_at + self.limit_s - self._clock()
