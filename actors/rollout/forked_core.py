"""vLLM's engine core as a fork of its actor, where both are on CPUs: what they import, some ten seconds, is imported once.

vLLM starts its core anew in a Ray actor, for the sake of executors that join Ray and of CUDA. On CPUs, with one worker, the core
has neither. What a fork must not keep is given back in it: the actor's connections, by whose end Ray sees that the actor is dead.
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
    """Inside, engines of this process have forks for their cores, but where a library has to be loaded before all others."""
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
    """Libraries that processes started from here on load before all others (LD_PRELOAD), and this one has not."""
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
    """In a fork: it ends with its actor, takes no object of that one apart, and holds no connection of that one open."""
    # vLLM has called `weights.register` in the actor, and takes that for done here too.
    end_with_parent()
    gc.freeze()
    end_of_imports()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        # What was listed is closed by now for one of them, the listing itself.
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(number).st_mode):
                # Not closed: whoever thinks that the number is his might end another's.
                os.dup2(nowhere, number, inheritable=False)
    os.close(nowhere)
