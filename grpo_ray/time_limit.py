"""A limit on the processor time of one call, in any thread: for foreign programs that run in ours, such as chat templates.

While there are such calls, one thread watches their clocks and raises an exception in the late one. A single step inside C code is
not interrupted.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TICK_S = 0.1
AGAIN_S = 1.0
"""A call that goes on all the same is ended once more after this much more processor time."""
WATCH = "grpo-ray time limit"
_lock = threading.Lock()
_ends: dict[int, float] = {}
"""Thread -> its processor time at which its call is late."""
_watching: list[threading.Thread] = []


class TooLongError(Exception):
    """The call used up its processor time."""


class _Late(BaseException):
    """Not an Exception, so that no `except Exception` on the way catches it."""


def within_thread_s(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of `call`.

    Raises:
        TooLongError: it took longer, measured to within a tick.
    """
    thread = threading.get_ident()
    try:
        try:
            with _lock:
                _ends[thread] = time.thread_time() + seconds
                _watch()
            return call()
        finally:
            with _lock:
                _ends.pop(thread, None)
                _raise_in(thread, None)
    except _Late:
        with _lock:
            _ends.pop(thread, None)
        raise TooLongError from None


def _watch() -> None:
    if not _watching:
        _watching.append(threading.Thread(target=_interrupt_late, name=WATCH, daemon=True))
        _watching[0].start()


def _interrupt_late() -> None:
    while True:
        time.sleep(TICK_S)
        with _lock:
            for thread, end in _ends.items():
                now = time.clock_gettime(time.pthread_getcpuclockid(thread))
                if now > end:
                    # Not at every tick: a second one would come while the first is handled, and be nobody's.
                    _ends[thread] = now + AGAIN_S
                    _raise_in(thread, _Late)
            if not _ends:
                _watching.clear()
                return


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), None if error is None else ctypes.py_object(error)
    )


def _begin_again() -> None:
    """Start anew in a fork, which has no watching thread, and may have inherited its lock in a locked state."""
    global _lock
    _lock = threading.Lock()
    _ends.clear()
    _watching.clear()


os.register_at_fork(after_in_child=_begin_again)
