"""CPU time of a piece of code that neither other threads nor what other tests have left behind can reach."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cpu_below(limit_s: float, what: object = "it") -> Iterator[None]:
    """The block fails when this thread spends `limit_s` seconds of CPU time in it; collections leave out what was there before."""
    gc.freeze()
    began = time.thread_time()
    try:
        yield
        spent_s = time.thread_time() - began
    finally:
        gc.unfreeze()
    assert spent_s < limit_s, f"{what!r} took {spent_s:.1f} s of CPU time"


def cpu_s_of(call: Callable[[], Any]) -> float:
    """Seconds of CPU time that this thread spends in a call; collections leave out what was there before."""
    gc.freeze()
    began = time.thread_time()
    try:
        call()
        return time.thread_time() - began
    finally:
        gc.unfreeze()
