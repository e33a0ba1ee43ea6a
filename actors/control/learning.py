"""What the controller needs of torch, imported once the engines have begun to start: they take longest, and do not wait for it."""

from __future__ import annotations

import asyncio
import importlib
import threading

from actors.runtime import within

MODULES = ("actors.learner.group", "grpo_ray.loop.train_loop", "grpo_ray.loop.supervised")
_importing = threading.Lock()


async def import_learning(limit_s: float) -> None:
    """Import torch and what learns in a thread; it takes seconds the first time.

    Raises:
        DeadlineError: it takes longer than `limit_s`: the packages lie on a file system that hangs.
    """
    await within(
        asyncio.to_thread(_import),
        limit_s,
        "the import of torch and Transformers in the controller",
        "deadlines.start_s",
    )


def _import() -> None:
    """One import at a time: threads that import torch, or what imports it, side by side see half-imported modules."""
    with _importing:
        for name in MODULES:
            importlib.import_module(name)
