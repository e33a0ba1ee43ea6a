"""Which engine gets the next request: the least loaded of those that may have one."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

MAX_ENGINES = 1 << 20
"""More than any pool has."""


class BalancedEngine(Protocol):
    """An engine, as far as the balance looks at it."""

    index: int
    alive: bool
    leaving: bool
    version: int | None
    """Of the weights that it holds."""
    place: int | None
    """Its entry in `EngineBalance._usable`."""

    @property
    def load(self) -> int:
        """Requests that it works on."""
        ...

    @property
    def tries_suspect(self) -> bool:
        """It works on a sample that is tried alone."""
        ...


E = TypeVar("E", bound=BalancedEngine)


class EngineBalance(Generic[E]):
    """The engines by their loads: a pool of a thousand is not searched for every sample."""

    def __init__(self, engines: Mapping[int, E]) -> None:
        """`engines`: by index; whoever changes what decides whether one gets requests calls `reconsider`."""
        self._engines = engines
        self._usable: list[int] = []
        """Load x MAX_ENGINES + index of each engine that may get more, sorted."""
        self._less_busy: set[E] = set()
        self.stale: set[E] = set()
        """Alive, with old weights."""
        self.version = 0
        """Of the weights that an engine has to hold to be used. Engines start with the model as it was given, version 0."""

    def reconsider(self, engine: E) -> None:
        """Its life, its weights or what it works on has changed."""
        self.stale.discard(engine)
        if engine.alive and not engine.leaving and engine.version != self.version:
            self.stale.add(engine)
        self._move(engine, self._place(engine))

    def reconsider_later(self, engine: E) -> None:
        """It has less work than before: that is looked at when the next request wants a place, which is less often."""
        self._less_busy.add(engine)

    def catch_up(self) -> None:
        """Do what `reconsider_later` has put off."""
        less_busy, self._less_busy = self._less_busy, set()
        for engine in less_busy:
            self.reconsider(engine)

    def least_loaded(self, below: int) -> E | None:
        """The usable engine with the fewest requests, of several the first; None if all have `below` or more."""
        if not self._usable:
            return None
        load, index = divmod(self._usable[0], MAX_ENGINES)
        return self._engines[index] if load < below else None

    def use_version(self, version: int) -> None:
        """From now on engines have to hold `version`."""
        self.version = version
        for engine in self._engines.values():
            self.reconsider(engine)

    def _place(self, engine: E) -> int | None:
        usable = engine.alive and not engine.leaving and engine.version == self.version and not engine.tries_suspect
        return engine.load * MAX_ENGINES + engine.index if usable else None

    def _move(self, engine: E, place: int | None) -> None:
        if place == engine.place:
            return
        if engine.place is not None:
            del self._usable[bisect.bisect_left(self._usable, engine.place)]
        if place is not None:
            bisect.insort(self._usable, place)
        engine.place = place
