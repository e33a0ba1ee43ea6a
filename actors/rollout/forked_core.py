"""vLLM's engine core as a fork of its actor, where both are on CPUs: their imports, about ten seconds, run once.

vLLM starts its core anew in a Ray actor, because of executors that join Ray and of CUDA. On CPUs, with one worker, the core
has neither. The fork gives up what it must not keep: the actor's connections, by whose end Ray sees that the actor is dead.
"""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from pathlib import Path

from actors.runtime import end_of_imports, end_with_parent


@contextmanager
def forked_core() -> Iterator[None]:
    """Inside, engines of this process fork their cores, unless a library has to be loaded before all others."""
    from vllm.v1.engine import utils

    start_anew = utils.get_mp_context

    def context() -> BaseContext:
        return start_anew() if missing_preloads() else Forking()

    utils.get_mp_context = context
    try:
        yield
    finally:
        utils.get_mp_context = start_anew


def missing_preloads() -> list[str]:
    """The libraries that processes started from here on load before all others (LD_PRELOAD), and this process did not."""
    mapped = Path("/proc/self/maps").read_text(errors="replace")
    wanted = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return [path for path in wanted if os.path.realpath(path) not in mapped]


class Core(ForkProcess):
    def run(self) -> None:
        leave_the_actor()
        super().run()


class Forking(ForkContext):
    Process = Core


def leave_the_actor() -> None:
    """Detach a fork from its actor: it ends with the actor, destroys no object of it, and holds no connection of it open."""
    # vLLM has called `weights.register` in the actor, and assumes that it holds here too.
    end_with_parent()
    gc.freeze()
    end_of_imports()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        # One of the listed descriptors is closed by now: that of the listing itself.
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                # Not closed: an object that still believes it owns the number could close another's.
                os.dup2(nowhere, number, inheritable=False)
    os.close(nowhere)
