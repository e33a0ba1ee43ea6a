"""Where a run lives on disk, and saving that is whole or not there at all.

    runs/NAME/checkpoints/step-000040/
        learner/     the learner's own state (DeepSpeed: weights, optimizer, schedule, random state)
        hf/          the policy as a Hugging Face model
        loop.json    step, cursor: what the loop needs to go on

Everything is written to `.step-000040.tmp` and renamed when complete: a folder under its final name is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from grpo_ray.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class RunDir:
    """The paths of a run; see DESIGN in the README's tree."""

    path: Path
    LOGS: ClassVar[str] = "logs"

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Raises ConfigError when the name is taken: runs are never overwritten. Logs of a start that failed are no run."""
        if path.exists() and any(entry.name != cls.LOGS for entry in path.iterdir()):
            raise ConfigError(
                f"run {path} exists already; continue it with `grpo-ray resume {path}`, or choose another with name=..."
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is not a run: it has no config.yaml")
        return cls(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def exported(self) -> Path:
        """The newest exported policy: a link to the `hf/` of a checkpoint."""
        return self.path / "hf"

    def step_folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        found = self.checkpoints.glob("step-*/loop.json") if self.checkpoints.is_dir() else []
        return sorted(int(p.parent.name.removeprefix("step-")) for p in found)

    def load_state(self, step: int) -> dict[str, Any]:
        path = self.step_folder(step) / "loop.json"
        try:
            state = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as e:
            raise CheckpointError(
                f"{path} can't be read ({e}); remove that checkpoint to resume from the one before it"
            ) from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: expected a mapping, got {type(state).__name__}")
        return state


async def save_checkpoint(
    run: RunDir, step: int, state: dict[str, Any], write: Callable[[Path], Awaitable[None]], *, keep: int
) -> Path:
    """Save atomically: `write(folder)` fills a folder aside, which then takes its final name.

    Args:
        state: JSON, for `RunDir.load_state`.
        write: writes `learner/` and, where asked, `hf/` below the folder that it is given.
        keep: older checkpoints than the newest `keep` are removed.

    Raises:
        CheckpointError: nothing is left under the final name, and the checkpoints before it are untouched.
    """
    final = run.step_folder(step)
    aside = run.checkpoints / f".{final.name}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        await write(aside)
        with open(aside / "loop.json", "w") as f:
            json.dump(state, f)
            f.flush()
            os.fsync(f.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        if (final / "hf").is_dir():
            _link(run.exported, final / "hf")
    except OSError as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"{_free_space(run.path)}: checkpoint of step {step} could not be written to {final} ({e})"
        ) from e
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in run.steps()[:-keep]:
        shutil.rmtree(run.step_folder(old), ignore_errors=True)
    return final


def _link(link: Path, target: Path) -> None:
    aside = link.with_name(f".{link.name}.tmp")
    aside.unlink(missing_ok=True)
    aside.symlink_to(os.path.relpath(target, link.parent))
    os.replace(aside, link)


def _free_space(path: Path) -> str:
    free = shutil.disk_usage(path).free
    return f"{free / 1e9:.1f} GB free on the disk of {path}"
