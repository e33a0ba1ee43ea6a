"""Activity of one worker as time spans that never overlap, kept in memory until a report that is sent anyway includes them.

The clock is `time.time()` of the worker's host: one clock for all workers of a node; those of other nodes are as far off as their
clocks are (milliseconds under NTP).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from grpo_ray.types import TimeSpan, Track

MAX_SPANS = 512
"""The most spans of one worker between two reports, some 50 kB. Above it neighbours are joined: see `joined`."""
JOINED_AT_ONCE = 32
IDLE = ""
NOT_BUSY = (IDLE, "paused", "restarting")
"""The activities in which a worker is not busy."""


class Activity:
    """The activity of one worker, `IDLE` at first."""

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
        """The busy seconds since it was created, including the current activity."""
        return self._busy_s + (max(0.0, self._clock() - self._since) if self._name not in NOT_BUSY else 0.0)

    def enter(self, name: str) -> None:
        """Start activity `name`. Starting the same again changes nothing."""
        if name != self._name:
            self._close()
            self._name = name

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Activity `name` inside the block, then the previous one again: a span inside a span cuts the outer one."""
        before = self._name
        self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def take(self) -> Track:
        """All spans since the last call; the current one is cut here and continues."""
        self._close()
        spans, self._spans = self._spans, []
        return Track(self.worker, tuple(spans))

    def finish(self) -> Track:
        """End the current activity and all that contain it, and take all spans: for the report of that activity."""
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
    """Join spans, keeping the seconds of each name: of every JOINED_AT_ONCE in a row those of one name become one, laid end to end
    from where the first began. The picture gets coarser, and sums stay exact."""
    out = []
    for first in range(0, len(spans), JOINED_AT_ONCE):
        part = spans[first : first + JOINED_AT_ONCE]
        start = part[0].start
        for name in dict.fromkeys(s.name for s in part):
            end = start + sum(s.seconds for s in part if s.name == name)
            out.append(TimeSpan(name, start, end))
            start = end
    return out
