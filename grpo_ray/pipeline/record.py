"""`pipeline.json`: what every stage was made from and what it made, with checksums; written whole or not at all.

A stage is done when it is here with its outputs. What it cost is beside that and has no part in what it is.
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
    """Of all starts."""
    tokens: int = 0
    """That it went through: sampled, or trained on."""
    starts: int = 0


@dataclass(frozen=True)
class StageRecord:
    kind: str
    config: str
    """Digest of what the recipe says of it."""
    done: bool = False
    inputs: dict[str, str] = field(default_factory=dict)
    """`zero.model`, or the path of a file -> SHA-256."""
    outputs: dict[str, str] = field(default_factory=dict)
    """`model` -> SHA-256 of the file, or of the names and sums of all files below the folder."""
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What the report tells besides: composition, why samples were left out."""
    cost: Cost = Cost()

    @property
    def identity(self) -> dict[str, Any]:
        """All but what it cost: the same after any number of kills."""
        return {key: value for key, value in asdict(self).items() if key != "cost"}


class Record:
    """Of one pipeline."""

    def __init__(self, path: Path, stages: dict[str, StageRecord]) -> None:
        self._path = path
        self.stages = stages

    @classmethod
    def open(cls, folder: Path) -> Record:
        """Raises CheckpointError for a file that is not what was written."""
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
        """It is to be run again."""
        if self.stages.pop(name, None) is not None:
            self._write()

    def _write(self) -> None:
        content = {"format": FORMAT, "stages": {name: asdict(stage) for name, stage in self.stages.items()}}
        write_whole(self._path, (json.dumps(content, indent=1) + "\n").encode())

    def add_cost(self, name: str, seconds: float, tokens: int) -> StageRecord:
        """The stage with one start more.

        Args:
            seconds: of this start.
            tokens: of all starts, as far as they count.
        """
        stage = self.stages[name]
        return replace(stage, cost=Cost(stage.cost.seconds + seconds, tokens, stage.cost.starts + 1))


def check_unchanged(path: Path, was: str, what: str, mend: str) -> None:
    """Raises CheckpointError when what a stage left is not what it was."""
    now = digest_of(path) if path.exists() else None
    if now is None:
        raise CheckpointError(f"{what} ({path}) is not there any more; {mend}")
    if now != was:
        raise CheckpointError(
            f"{what} ({path}) has changed since it was made: its SHA-256 is {now[:12]}.., and was {was[:12]}..; {mend}"
        )
