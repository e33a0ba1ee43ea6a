"""A learner's state to a folder and back, without a run around it."""

from __future__ import annotations

import shutil
from pathlib import Path

from actors.learner.group import LearnerGroup
from grpo_ray.run.checkpoint_store import CheckpointLocation


async def save(group: LearnerGroup, folder: Path) -> None:
    """Into an existing folder that holds none."""
    await group.hold(CheckpointLocation(str(folder)), export=False)
    await group.write(CheckpointLocation(str(folder)))


async def load(group: LearnerGroup, folder: Path) -> None:
    await group.load(CheckpointLocation(str(folder)))


async def export(group: LearnerGroup, folder: Path) -> None:
    """The policy as a Hugging Face model, into an existing folder."""
    whole = folder.with_name(f"{folder.name}.checkpoint")
    whole.mkdir()
    await group.hold(CheckpointLocation(str(whole)), export=True)
    await group.write(CheckpointLocation(str(whole)))
    shutil.copytree(whole / "hf", folder, dirs_exist_ok=True)
    shutil.rmtree(whole)
