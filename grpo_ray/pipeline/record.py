"""The record `pipeline.json`: inputs and outputs of every stage, with checksums; it is written as a whole or not at all.

A stage is done when it is here with its outputs. Its cost is recorded too, and is no part of its identity.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo_ray.errors import CheckpointError
from grpo_ray.files import read_json, write_whole
from grpo_ray.run.manifest import digest_of

NAME = "pipeline.json"
FORMAT = 1


@dataclass(frozen=True)
class Cost:
    seconds: float = 0.0
    """The seconds of all starts."""
    tokens: int = 0
    """The number of tokens that it processed: sampled, or trained on."""
    starts: int = 0


@dataclass(frozen=True)
class StageRecord:
    kind: str
    config: str
    """The digest of its config in the recipe."""
    done: bool = False
    inputs: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each input: `zero.model`, or the path of a file."""
    outputs: dict[str, str] = field(default_factory=dict)
    """The SHA-256 of each output, e.g. `model`: of the file, or of the names and sums of all files below the folder."""
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """Other facts for the report: composition, why samples were left out."""
    cost: Cost = Cost()


class Record:
    """The record of one pipeline."""

    def __init__(self, path: Path, stages: dict[str, StageRecord]) -> None:
        self._path = path
        self.stages = stages

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Open the record. Raises CheckpointError for a file that was not written by this class."""
        path = folder / NAME
        if not path.is_file():
            return cls(path, {})
        try:
            content = read_json(path)
            if content["format"] != FORMAT:
                raise ValueError(f"it is of format {content['format']}, this is format {FORMAT}")
            stages = {
                name: StageRecord(**{**entry, "cost": Cost(**entry["cost"])})
                for name, entry in content["stages"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(
                f"{path} can't be read ({e}); restore it from a copy, or take it away to run all stages again"
            ) from None
        return cls(path, stages)

    def done(self, name: str) -> bool:
        return name in self.stages and self.stages[name].done

    def put(self, name: str, stage: StageRecord) -> None:
        self.stages[name] = stage
        self._write()

    def forget(self, name: str) -> None:
        """Forget a stage, so that it runs again."""
        if self.stages.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        content = {"format": FORMAT, "stages": {name: asdict(stage) for name, stage in self.stages.items()}}
        write_whole(self._path, (json.dumps(content, indent=1) + "\n").encode())

    def add_cost(self, name: str, seconds: float, tokens: int) -> StageRecord:
        """Add one start to the stage.

        Args:
            seconds: the seconds of this start.
            tokens: the tokens of all starts, as far as they count.
        """
        stage = self.stages[name]
        return replace(stage, cost=Cost(stage.cost.seconds + seconds, tokens, stage.cost.starts + 1))


def check_unchanged(path: Path, was: str, what: str, mend: str) -> None:
    """Check the output of a stage. Raises CheckpointError when it has changed."""
    now = digest_of(path) if path.exists() else None
    if now is None:
        raise CheckpointError(f"{what} ({path}) is not there any more; {mend}")
    if now != was:
        raise CheckpointError(
            f"{what} ({path}) has changed since it was made: its SHA-256 is {now[:12]}.., and was {was[:12]}..; {mend}"
        )
