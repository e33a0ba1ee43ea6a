"""Paths of a run on disk, and the choice of the checkpoint to resume from.

runs/NAME/checkpoints/step-000040/     and below checkpoint.path, if given; see checkpoint_store.py
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
    """The option checkpoint.path: a folder or URL in which each run has one of its name. None: `checkpoints/` of the run."""
    patience_s: float = PATIENCE_S
    """How long to retry while a store does not answer, where the run cannot do without it."""
    LOGS: ClassVar[str] = "logs"
    NO_RUN: ClassVar[tuple[str, ...]] = (LOGS, ownership.FOLDER)
    """The contents of a folder before a run starts, which a failed start leaves behind."""

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Create the folder. Raises ConfigError when the name is taken: runs are never overwritten. Logs of a failed start are
        no run."""
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
        """The same folder with its checkpoints at `path`; `store_s` is deadlines.store_s."""
        return replace(self, checkpoint_path=path, patience_s=min(store_s, PATIENCE_S))

    @property
    def store(self) -> Store:
        """The final store of its checkpoints."""
        where = self.checkpoint_path
        if where is None:
            return Store(str(self.path / "checkpoints"))
        folder = where.rstrip("/") if is_url(where) else str(Path(where).expanduser().resolve())
        return Store(f"{folder}/{self.path.resolve().name}", self.patience_s)

    @property
    def outbox(self) -> Store:
        """The store in which checkpoints are written: the final one, or if that is remote a folder from which they are sent
        there."""
        return Store(str(self.path / "checkpoints")) if self.store.is_remote else self.store

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def superseded(self) -> Path:
        """The folder of records that restarts superseded; see `grpo_ray.run.records`."""
        return self.path / "superseded"

    @property
    def samples(self) -> Path:
        """The folder of `grpo-ray sample`."""
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
        """The newest step with a checkpoint. A remote store is asked only if the folder from which checkpoints are sent has none.
        Raises StoreError.
        """
        return max(self.outbox.steps() or self.store.steps(), default=None)

    @property
    def _stores(self) -> list[Store]:
        """The stores, the nearest first."""
        return [self.outbox, self.store] if self.store.is_remote else [self.store]

    def place(self, step: int) -> CheckpointLocation:
        """The location from which to read that checkpoint."""
        return (self.outbox if self.outbox.has(step) else self.store).place(step)

    def first_wrong(self, step: int) -> str | None:
        """The first invalid file of a checkpoint, see `Store.first_wrong`."""
        return (self.outbox if self.outbox.has(step) else self.store).first_wrong(step)

    def has_some(self) -> bool:
        """Whether there is a checkpoint. A store that does not answer is assumed to have one."""
        if self.outbox.steps():
            return True
        try:
            return self.store.is_remote and bool(self.store.steps())
        except CheckpointError:
            return True

    def latest_valid_step(self, tell: Callable[[str], None]) -> int | None:
        """The step of the newest checkpoint that passes its checksums; None if the run has no checkpoint.

        Newer broken ones are reported and marked as invalid. While the store does not answer, a checkpoint that was not sent there
        yet is the newest.

        Raises:
            CheckpointError: there are checkpoints, and none is valid.
            StoreError: the store refuses, or it does not answer and no other checkpoint is valid.
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
        """The loop's saved state."""
        place = self.place(step)
        try:
            state = parse_json(place.read(LOOP_STATE))
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{place.path(LOOP_STATE)} can't be read ({e})") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{place.path(LOOP_STATE)}: expected a mapping, got {type(state).__name__}")
        return state

    def link_export(self, place: CheckpointLocation) -> None:
        """Point `hf` to the model of this checkpoint, where it has one and stays here."""
        target = Path(place.url) / "hf"
        if self.store.is_remote or not target.is_dir():
            return
        link_whole(self.exported, os.path.relpath(target, self.path))
