"""A limit on the CPU time of one call, for libraries that may compute without end.

The clock is the process's CPU time, not the wall: on a busy machine a right answer needs longer, but no more work.
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
"""0 would stop the timer."""


class OutOfTimeError(Exception):
    """The call used up its CPU time."""


class _Expired(BaseException):
    """No Exception, so that no `except Exception` on the way keeps it."""


class _Clock:
    end = math.inf
    """CPU seconds of the process at which the innermost call has used up its time."""


def within_cpu_s(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns, if it takes no more than so many seconds of CPU time. Inside of another such call it has what is left
    of that one's, at most.

    A single step inside C code is not interrupted. The signal is SIGPROF, whose handler stays installed: one that comes
    late must not end the process.

    Raises:
        OutOfTimeError: it took longer.
        RewardError: this is not the main thread of the process, where alone Python delivers signals.
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
    # Again and again, for a bare `except` on the way may have kept the first one.
    signal.setitimer(signal.ITIMER_PROF, left, _AGAIN_S)


def _expire(_signal: int, _frame: Any) -> None:
    if time.process_time() >= _Clock.end:
        raise _Expired
