"""The controller as the owner of its run's folders; see `grpo_ray.run.ownership`."""

from __future__ import annotations

import os
from pathlib import Path

from grpo_ray.run.checkpoint_store import is_url
from grpo_ray.run.ownership import Owner, describe
from grpo_ray.run.run_dir import RunDir

WRITERS = {"grpo": "train", "sft": "sft", "dpo": "dpo", "reward_model": "reward-model", "sample": "sample"}
"""The kinds of run that write in their folder, and their commands. The others only leave logs there."""


def folders_of(run: RunDir, kind: str) -> list[Path]:
    """The folders in which no other process may write: of two runs of one name and one `checkpoint.path` the second would delete
    what the first saves. Object stores cannot be locked."""
    if kind not in WRITERS:
        return []
    store = run.store.url
    return [run.path] if run.checkpoint_path is None or is_url(store) else [run.path, Path(store)]


def controller_of(name: str, kind: str, *, detached: bool) -> Owner:
    """This process as the owner: the controller of that run."""
    if detached:
        end = f"`grpo-ray logs {name}` shows it, `grpo-ray stop {name}` ends it"
    else:
        end = f"it ends by itself without the command that started it, or by `kill {os.getpid()}` there"
    return describe(f"a run of `grpo-ray {WRITERS.get(kind, kind)}`", end, ends_with_command=not detached)
