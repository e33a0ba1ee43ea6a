"""A limit on the CPU time of one call, for libraries that may compute without end.

The clock is the process's CPU time, not the wall: on a busy machine a right answer needs longer, but no more work.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from grpo_ray.errors import RewardError

T = TypeVar("T")
_AGAIN_S = 0.1


class OutOfTimeError(Exception):
    """The call used up its CPU time."""


class _Expired(BaseException):
    """No Exception, so that no `except Exception` on the way keeps it."""


class _Clock:
    running = False


def within_cpu_s(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, if it takes no more than so many seconds of CPU time.

    A single step inside C code is not interrupted. The signal is SIGPROF, whose handler stays installed: one that comes
    late must not end the process.

    Raises:
        OutOfTimeError: it took longer.
        RewardError: this is not the main thread of the process, where alone Python delivers signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RewardError("reward 'accuracy' has to run in the main thread of a process: its time limit is a signal")
    signal.signal(signal.SIGPROF, _expire)
    try:
        try:
            _Clock.running = True
            # Again and again, for a bare `except` on the way may have kept the first one.
            signal.setitimer(signal.ITIMER_PROF, seconds, _AGAIN_S)
            return call()
        finally:
            _Clock.running = False
            signal.setitimer(signal.ITIMER_PROF, 0)
    except _Expired:
        _Clock.running = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        raise OutOfTimeError from None


def _expire(_signal: int, _frame: Any) -> None:
    if _Clock.running:
        raise _Expired
