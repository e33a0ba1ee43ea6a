"""What the controller needs of torch, imported once the engines have begun to start: they take longest, and do not wait for it."""

from __future__ import annotations

import importlib
import threading

MODULES = ("actors.learner.group", "grpo_ray.loop.train_loop", "grpo_ray.loop.supervised")
_importing = threading.Lock()


def import_learning() -> None:
    """Import torch and what learns; it takes seconds the first time and is meant for a thread. One import at a time: threads that
    import torch, or what imports it, side by side see half-imported modules."""
    with _importing:
        for name in MODULES:
            importlib.import_module(name)
