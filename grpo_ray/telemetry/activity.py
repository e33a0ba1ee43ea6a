"""What one worker does, as spans of time that never overlap. Kept in memory until a report that is sent anyway takes them along.

The clock is `time.time()` of the worker's host: one clock for all workers of a node; those of other nodes are as far off as their
clocks are (milliseconds under NTP).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from grpo_ray.types import TimeSpan, Track

MAX_SPANS = 512
"""Of one worker between two reports, some 50 kB. Above it neighbours are joined: see `joined`."""
JOINED_AT_ONCE = 32
IDLE = ""
NOT_BUSY = (IDLE, "paused", "restarting")
"""What a worker does when it is not busy."""


class Activity:
    """The state of one worker, `IDLE` at first."""

    __slots__ = ("_busy_s", "_clock", "_name", "_since", "_spans", "worker")

    def __init__(self, worker: str, clock: Callable[[], float] = time.time) -> None:
        self.worker = worker
        self._clock = clock
        self._name = IDLE
        self._since = clock()
        self._spans: list[TimeSpan] = []
        self._busy_s = 0.0

    @property
    def busy_s(self) -> float:
        """Since it was made, what is under way included."""
        return self._busy_s + (max(0.0, self._clock() - self._since) if self._name not in NOT_BUSY else 0.0)

    def enter(self, name: str) -> None:
        """From now on it does `name`. The same again changes nothing."""
        if name != self._name:
            self._close()
            self._name = name

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """`name` inside the block, then again what it did before: a span inside a span cuts the outer one."""
        before = self._name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def take(self) -> Track:
        """Everything since the last call; what is under way is cut here and goes on."""
        self._close()
        spans, self._spans = self._spans, []
        return Track(self.worker, tuple(spans))

    def finish(self) -> Track:
        """End what is under way, with all that it is inside of, and take everything: for the report of it."""
        self.enter(IDLE)
        return self.take()

    def _close(self) -> None:
        name, since, now = self._name, self._since, self._clock()
        # A clock that was set back makes a span shorter, never one that overlaps.
        if now <= since:
            return
        self._since = now
        if name == IDLE:
            return
        self._spans.append(TimeSpan(name, since, now))
        if name not in NOT_BUSY:
            self._busy_s += now - since
        if len(self._spans) >= MAX_SPANS:
            self._spans = joined(self._spans)


def joined(spans: Sequence[TimeSpan]) -> list[TimeSpan]:
    """Fewer spans with the same seconds under each name: of every JOINED_AT_ONCE in a row those of one name become one, laid
    end to end from where the first began. A picture a little coarser, and sums that stay exact."""
    out = []
    for first in range(0, len(spans), JOINED_AT_ONCE):
        part = spans[first : first + JOINED_AT_ONCE]
        start = part[0].start
        for name in dict.fromkeys(s.name for s in part):
            end = start + sum(s.seconds for s in part if s.name == name)
            out.append(TimeSpan(name, start, end))
            start = end
    return out
