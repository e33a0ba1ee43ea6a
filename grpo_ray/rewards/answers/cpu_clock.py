"""A limit on the CPU time of one call, for libraries that may compute forever.

The clock is the process's CPU time, not wall time: on a busy machine a right answer takes longer, but no more work.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from grpo_ray.errors import RewardError

T = TypeVar("T")
_AGAIN_S = 0.1
_LEAST_S = 1e-4
"""The smallest time for the timer; 0 would stop it."""


class OutOfTimeError(Exception):
    """The call used up its CPU time."""


class _Expired(BaseException):
    """The exception that the clock raises. It is no Exception, so that no `except Exception` on the way swallows it."""


class _Clock:
    end = math.inf
    """The CPU time of the process, in seconds, at which the innermost call runs out of time."""


def within_cpu_s(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, within a limit on its CPU time. Nested in another such call, the limit is at most the remainder of the
    outer one.

    A single step inside C code is not interrupted. The signal is SIGPROF, whose handler stays installed: a late signal
    must not end the process.

    Raises:
        OutOfTimeError: it took longer.
        RewardError: this is not the main thread of the process, the only one to which Python delivers signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RewardError("reward 'accuracy' has to run in the main thread of a process: its time limit is a signal")
    outer, now = _Clock.end, time.process_time()
    end = min(outer, now + seconds)
    if end <= now:
        raise OutOfTimeError
    signal.signal(signal.SIGPROF, _expire)
    try:
        try:
            _set(end)
            return call()
        finally:
            _set(outer)
    except _Expired:
        _set(outer)
        raise OutOfTimeError from None


def _set(end: float) -> None:
    _Clock.end = end
    left = 0.0 if end == math.inf else max(_LEAST_S, end - time.process_time())
    # The timer repeats, since a bare `except` on the way may have swallowed the first signal.
    signal.setitimer(signal.ITIMER_PROF, left, _AGAIN_S)


def _expire(_signal: int, _frame: Any) -> None:
    if time.process_time() >= _Clock.end:
        raise _Expired
