"""Where a run lives on disk, and which of its checkpoints to go on from.

runs/NAME/checkpoints/step-000040/     and below checkpoint.path, where that is given; see checkpoint_store.py
    manifest.json   written last: size and SHA-256 of every other file
    learner/        a folder for every rank; see learner_files.py
    hf/             the policy as a Hugging Face model
    loop/           loop.json: step, cursor; groups.parquet: finished and not yet trained
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from grpo_ray.errors import CheckpointError, ConfigError, StoreAwayError
from grpo_ray.files import link_whole, parse_json
from grpo_ray.object_store import PATIENCE_S
from grpo_ray.run import ownership
from grpo_ray.run.checkpoint_store import CheckpointLocation, Store, is_url

LOOP = "loop"
LOOP_STATE = f"{LOOP}/loop.json"


@dataclass(frozen=True)
class RunDir:
    """The paths of a run; see DESIGN in the README's tree."""

    path: Path
    checkpoint_path: str | None = None
    """checkpoint.path: a folder or URL in which each run has one of its name. None: `checkpoints/` of the run."""
    patience_s: float = PATIENCE_S
    """For a store that does not answer, where the run can't do without."""
    LOGS: ClassVar[str] = "logs"
    NO_RUN: ClassVar[tuple[str, ...]] = (LOGS, ownership.FOLDER)
    """What is left of a start that failed, and what a start begins with."""

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Raises ConfigError when the name is taken: runs are never overwritten. Logs of a start that failed are no run."""
        if cls.is_taken(path):
            raise ConfigError(
                f"run {path} exists already; continue it with `grpo-ray resume {path}` (on a cluster "
                f"`grpo-ray submit --resume {path.name}`), or choose another with name=..."
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def is_taken(cls, path: Path) -> bool:
        return path.exists() and (not path.is_dir() or any(entry.name not in cls.NO_RUN for entry in path.iterdir()))

    @classmethod
    def open(cls, path: Path) -> RunDir:
        if (path / "pipeline.json").is_file():
            raise ConfigError(
                f"{path} is a pipeline, not a run: `grpo-ray pipeline RECIPE`, as it was begun, goes on; its stages are runs"
            )
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is not a run: it has no config.yaml")
        return cls(path)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    def with_checkpoints(self, path: str | None, store_s: float = PATIENCE_S) -> RunDir:
        """`store_s`: deadlines.store_s."""
        return replace(self, checkpoint_path=path, patience_s=min(store_s, PATIENCE_S))

    @property
    def store(self) -> Store:
        """Of its checkpoints, in the end."""
        where = self.checkpoint_path
        if where is None:
            return Store(str(self.path / "checkpoints"))
        folder = where.rstrip("/") if is_url(where) else str(Path(where).expanduser().resolve())
        return Store(f"{folder}/{self.path.resolve().name}", self.patience_s)

    @property
    def outbox(self) -> Store:
        """Where checkpoints are made: in the store itself, or if that is remote in a folder from which they are sent there."""
        return Store(str(self.path / "checkpoints")) if self.store.is_remote else self.store

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def superseded(self) -> Path:
        """What restarts took back; see `grpo_ray.run.records`."""
        return self.path / "superseded"

    @property
    def samples(self) -> Path:
        """What `grpo-ray sample` made."""
        return self.path / "samples"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def exported(self) -> Path:
        """The newest exported policy: a link to the `hf/` of a checkpoint."""
        return self.path / "hf"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending. Raises StoreError."""
        return sorted({step for store in self._stores for step in store.steps()})

    def newest_step(self) -> int | None:
        """The newest step with a checkpoint. A remote store is asked only where none is in the folder that they are sent from.
        Raises StoreError."""
        return max(self.outbox.steps() or self.store.steps(), default=None)

    @property
    def _stores(self) -> list[Store]:
        """The nearest first."""
        return [self.outbox, self.store] if self.store.is_remote else [self.store]

    def place(self, step: int) -> CheckpointLocation:
        """Where to read that checkpoint."""
        return (self.outbox if self.outbox.has(step) else self.store).place(step)

    def first_wrong(self, step: int) -> str | None:
        """See `Store.first_wrong`."""
        return (self.outbox if self.outbox.has(step) else self.store).first_wrong(step)

    def has_some(self) -> bool:
        """Is there a checkpoint? A store that says nothing is taken to have one."""
        if self.outbox.steps():
            return True
        try:
            return self.store.is_remote and bool(self.store.steps())
        except CheckpointError:
            return True

    def latest_valid_step(self, tell: Callable[[str], None]) -> int | None:
        """The step to go on from: of the newest checkpoint whose every byte is what it was. None: the run has none.

        What is broken above it is told, and no checkpoint any more. While the store does not answer, one that was not sent there
        yet is the newest.

        Raises:
            CheckpointError: there are some, and none is whole.
            StoreError: the store refuses, or it does not answer and nothing else is whole.
        """
        away: StoreAwayError | None = None
        found: list[tuple[int, int, Store]] = []
        for distance, store in enumerate(self._stores):
            try:
                found += [(-step, distance, store) for step in store.steps()]
            except StoreAwayError as e:
                if not found:
                    raise
                away = e
        wrong: list[tuple[int, Store]] = []
        for negative, _, store in sorted(found, key=lambda one: one[:2]):
            step = -negative
            reason = store.first_wrong(step)
            if reason is None:
                for broken, of in wrong:
                    of.set_aside(broken)
                if away is not None:
                    tell(f"{away}; going on from what is in {store.url}, which was not sent there yet")
                return step
            wrong.append((step, store))
            tell(
                f"the checkpoint of step {step} is broken: {reason}, in {store.place(step).url}; using the one before it"
            )
        if away is not None:
            raise away
        if wrong:
            raise CheckpointError(
                f"none of the checkpoints in {self.store.url} is whole (steps "
                f"{', '.join(map(str, sorted({step for step, _ in wrong})))}); put one back "
                "from a copy, or start a new run, e.g. from the newest exported model with model.path="
            )
        if old := self.store.earlier_format():
            raise CheckpointError(
                f"the checkpoints in {self.store.url} (the last of step {old[-1]}) are DeepSpeed's, of an earlier version of "
                f"grpo-ray; go on in a new run from their exported model: model.path={self.store.place(old[-1]).url}/hf"
            )
        return None

    def load_state(self, step: int) -> dict[str, Any]:
        """What the loop has saved of itself."""
        place = self.place(step)
        try:
            state = parse_json(place.read(LOOP_STATE))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{place.path(LOOP_STATE)} can't be read ({e})") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{place.path(LOOP_STATE)}: expected a mapping, got {type(state).__name__}")
        return state

    def link_export(self, place: CheckpointLocation) -> None:
        """Let `hf` lead to the model of this checkpoint, where it has one and stays here."""
        target = Path(place.url) / "hf"
        if self.store.is_remote or not target.is_dir():
            return
        link_whole(self.exported, os.path.relpath(target, self.path))
