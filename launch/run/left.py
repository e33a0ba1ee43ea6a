"""What is left of a run that ended early, in one line, and how to go on, from the present state of its folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from grpo_ray.run.ownership import commanded, forget_dead
from grpo_ray.run.records import last_step
from grpo_ray.run.run_dir import RunDir
from launch.interrupts import at_end, leaving


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run's folder, so that this command alone writes in it, see `grpo_ray.run.ownership`; empty folders are removed, after
    a signal too."""
    with commanded(folder) as command:

        def release() -> None:
            command.release()
            with contextlib.suppress(OSError):
                folder.rmdir()

        def last() -> None:
            # A controller that a signal has ended meanwhile released nothing.
            forget_dead(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()

        at_end(last)
        with leaving(end=release):
            try:
                yield
            finally:
                release()


def remove_if_nothing_happened(run: RunDir) -> None:
    """Remove a run that ended before its first step, except for its logs: its name is free again."""
    if not run.path.is_dir() or run.metrics.exists() or run.has_some():
        return
    for entry in run.path.iterdir():
        if entry.name in RunDir.NO_RUN:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if not any(run.path.iterdir()):
        run.path.rmdir()


def left_of(run: RunDir, command: str) -> str:
    """One line on what is left of a run, and how to go on.

    Args:
        command: the command that began the run.
    """
    if not run.config.is_file():
        there = (
            f"of the run only {run.path}/{RunDir.LOGS} is left" if run.path.is_dir() else "nothing is left of the run"
        )
        return f"nothing was trained, and {there}; `{command}` begins again"
    again = f"`grpo-ray resume {run.path}`"
    recorded = last_step(run)
    # A remote store is not queried here: one that does not answer would hold up the end.
    steps = run.outbox.steps()
    if not steps and run.store.is_remote:
        return f"{again} goes on from the newest checkpoint in {run.store.url}; {recorded} steps are recorded"
    if not steps:
        return (
            f"there is no checkpoint yet; {again} begins from the start"
            if not recorded
            else (f"{recorded} steps are recorded, and there is no checkpoint in {run.store.url} to go on from")
        )
    again_from = f"{again} goes on after step {steps[-1]}"
    if recorded > steps[-1]:
        return f"{again_from}, its newest checkpoint, and does {_steps(steps[-1] + 1, recorded)} again"
    return again_from


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"steps {first} to {last}"


def left_of_samples(run: RunDir, command: str) -> str:
    files = len(list(run.samples.glob("*.parquet"))) if run.samples.is_dir() else 0
    if not run.config.is_file():
        return f"nothing was sampled and nothing is left; `{command}` begins again"
    kept = f"{files} finished file{'s' * (files != 1)} of samples {'are' if files != 1 else 'is'} in {run.samples}"
    return f"{kept}; `grpo-ray resume {run.path}` makes the rest"
