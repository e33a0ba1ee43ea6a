"""asyncio.Future that runs its one callback synchronously on completion, which saves an event-loop iteration.

A sample waits for two of them, its completion and its score: with thousands of samples in flight these iterations were a tenth of
the controller's work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class ImmediateFuture(asyncio.Future[T]):
    """Future that can be awaited like any other, or hand its result to one callback synchronously.

    The callback runs inside the code that sets the result, which has to tolerate calls back into it.
    """

    __slots__ = ("_taker",)

    def __init__(self) -> None:
        super().__init__(loop=asyncio.get_running_loop())
        self._taker: Callable[[asyncio.Future[T]], None] | None = None

    def when_done(self, taker: Callable[[asyncio.Future[T]], None]) -> None:
        """Call `taker` with this future on completion; in the next iteration of the event loop if it is done already."""
        if self.done():
            self.add_done_callback(taker)
        else:
            self._taker = taker

    def set_result(self, result: T) -> None:
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: type | BaseException) -> None:
        super().set_exception(exception)
        self._tell()

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled:
            self._tell()
        return cancelled

    def _tell(self) -> None:
        taker, self._taker = self._taker, None
        if taker is not None:
            taker(self)
