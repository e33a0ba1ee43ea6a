"""The balance of load: which engine gets the next request, the least loaded of those that may have one."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

MAX_ENGINES = 1 << 20
"""A number that no pool's size reaches."""


class BalancedEngine(Protocol):
    """An engine, as the balance sees it."""

    index: int
    alive: bool
    leaving: bool
    version: int | None
    """The version of the weights that the engine holds."""
    place: int | None
    """The engine's entry in `EngineBalance._usable`."""

    @property
    def load(self) -> int:
        """The number of requests that the engine has."""
        ...

    @property
    def tries_suspect(self) -> bool:
        """Whether the engine works on a suspect sample, which is tried alone."""
        ...


E = TypeVar("E", bound=BalancedEngine)


class EngineBalance(Generic[E]):
    """Keeps the engines sorted by their loads: a pool of a thousand is not searched for every sample."""

    def __init__(self, engines: Mapping[int, E]) -> None:
        """`engines` are by index; whoever changes what decides whether one gets requests calls `reconsider`."""
        self._engines = engines
        self._usable: list[int] = []
        """The sorted entries, load x MAX_ENGINES + index, of the engines that may get more."""
        self._less_busy: set[E] = set()
        self.stale: set[E] = set()
        """The engines that are alive and hold old weights."""
        self.version = 0
        """The version of the weights that a usable engine holds. Engines start with version 0, the given model."""

    def reconsider(self, engine: E) -> None:
        """Update the entry of an engine that started, died, got weights, or has other work."""
        self.stale.discard(engine)
        if engine.alive and not engine.leaving and engine.version != self.version:
            self.stale.add(engine)
        self._move(engine, self._place(engine))

    def reconsider_later(self, engine: E) -> None:
        """Mark an engine that has less work; its entry is updated by `catch_up`, before the next requests are dispatched."""
        self._less_busy.add(engine)

    def catch_up(self) -> None:
        """Update the entries that `reconsider_later` has deferred."""
        less_busy, self._less_busy = self._less_busy, set()
        for engine in less_busy:
            self.reconsider(engine)

    def least_loaded(self, below: int) -> E | None:
        """The usable engine with the fewest requests, the first among equals; None if all have `below` or more."""
        if not self._usable:
            return None
        load, index = divmod(self._usable[0], MAX_ENGINES)
        return self._engines[index] if load < below else None

    def use_version(self, version: int) -> None:
        """Make `version` the one that engines have to hold."""
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
