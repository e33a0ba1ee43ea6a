"""How long a worker may take to start: rollout engines, reward workers, learner ranks and scoring processes alike.

A start that takes far longer than those before it hangs, or there is no room for the worker: it is begun again with twice the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RESTART_S, RESTART_FACTOR = 30.0, 5.0
"""A start that replaces a worker may take this many seconds, and this many times the longest start so far."""


class Patience:
    """Seconds that the starts of one kind of worker may take; the first one `limit_s`."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self.longest_s = 0.0
        """The longest start so far; 0 before the first."""
        self._clock = clock
        self._died_at = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """The block is a start; it counts unless it raises."""
        began = self._clock()
        yield
        self.longest_s = max(self.longest_s, self._clock() - began)

    def died(self) -> None:
        """A worker died, or its start failed: the time in which one has to start begins anew."""
        self._died_at = self._clock()

    @property
    def again_s(self) -> float:
        """A start that takes longer, and is not the first, hangs."""
        if not self.longest_s:
            return self.limit_s
        return min(self.limit_s, RESTART_S + RESTART_FACTOR * self.longest_s)

    def doubled(self, seconds: float) -> float:
        """For the next start after one that hung for `seconds`."""
        return min(2 * seconds, self.limit_s)

    @property
    def left_s(self) -> float:
        """Until a pool without any worker is given up."""
        return self._died_at + self.limit_s - self._clock()
