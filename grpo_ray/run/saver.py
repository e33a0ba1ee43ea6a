"""Saving while training goes on: copies are taken between two steps and written in the background.

    save  ->  [the save before it is finished]  begin -> hold   |   write -> commit  (-> sent to the store, see delivery.py)
              what the loop waits for                          |   in the background

A failed write is reported at once, and raised by the next save or at the run's end.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from grpo_ray.config.common import DeadlineConfig
from grpo_ray.errors import CheckpointError, GrpoRayError, StoreError
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.delivery import Delivery
from grpo_ray.run.manifest import FileSum
from grpo_ray.run.run_dir import LOOP, LOOP_STATE, RunDir
from grpo_ray.telemetry.events import CheckpointEvent, Event, MessageEvent

BACKGROUND = "checkpoint/background_s"
More = Callable[[], Awaitable[Callable[[Path], None]]]
"""Awaited in the background; its result writes files into a folder, in a thread."""


class Holder(Protocol):
    """An object to be saved: its state is copied into memory, and written from there."""

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        """Copy into memory what `write` will write."""
        ...

    async def write(self, place: CheckpointLocation) -> Mapping[str, FileSum]:
        """Write the held copy into a new place; returns what was written."""
        ...


class Saver:
    """Saver of one checkpoint at a time."""

    def __init__(
        self,
        run: RunDir,
        learner: Holder,
        *,
        keep: int,
        emit: Callable[[Event], None],
        store_s: float = DeadlineConfig.model_fields["store_s"].default,
    ) -> None:
        """Create the saver.

        Args:
            keep: the number of newest checkpoints that are kept.
            store_s: see deadlines.store_s.
        """
        self._run = run
        self._learner = learner
        self._keep = keep
        self._emit = emit
        remote = run.store.is_remote
        self._delivery = Delivery(run.outbox, run.store, keep=keep, limit_s=store_s, emit=emit) if remote else None
        self._writing: asyncio.Task[None] | None = None
        self._seconds: float | None = None
        self._began = time.monotonic()
        """The time at which the last save began."""

    def is_late(self, minutes: float) -> bool:
        """Whether the last save, or the start, was longer ago than this; never for 0."""
        return 0 < minutes * 60 <= time.monotonic() - self._began

    def send_leftovers(self) -> None:
        """Send to the store what an earlier start of the run could not send."""
        if self._delivery is not None:
            self._delivery.offer_leftovers()

    @property
    def gave_up(self) -> bool:
        """Whether the store was given up after too long a silence: the run has to end, from a checkpoint in its own folder."""
        return self._delivery is not None and self._delivery.gave_up is not None

    async def save(self, step: int, state: dict[str, Any], *, export: bool, more: More | None = None) -> None:
        """Save a checkpoint. Returns when training may go on; the checkpoint is complete later, or absent.

        Args:
            step: the step of the checkpoint.
            state: the loop's state as JSON, for `RunDir.load_state`.
            export: also the policy as a Hugging Face model.
            more: files to write beside loop.json.

        Raises:
            CheckpointError: there is no space, or the save before this one failed.
        """
        await self.finish()
        self._began = began = time.monotonic()
        place = await asyncio.to_thread(self._run.outbox.begin, step)
        try:
            await self._learner.hold(place, export=export)
        except BaseException:
            await asyncio.to_thread(self._run.outbox.discard, place)
            raise
        self._writing = asyncio.create_task(self._write(place, step, state, more, began))

    def follow(self, learner: Holder) -> None:
        """Save this learner from now on."""
        self._learner = learner

    async def finish(self) -> None:
        """Wait until the save in progress is complete. Raises its exception."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def deliver(self) -> None:
        """Finish the save in progress, and wait until it is in the store too.

        Raises:
            CheckpointError: the save failed; or it could not be sent, and is in the run's folder.
        """
        await self.finish()
        if self._delivery is None:
            return
        try:
            await self._delivery.finish()
        except StoreError as e:
            kept = self._run.outbox.steps()[-1:]
            where = "".join(f". The checkpoint of step {s} is in {self._run.outbox.place(s).url}" for s in kept)
            raise StoreError(f"{e}{where}: `grpo-ray resume {self._run.path}` goes on") from None

    async def close(self) -> None:
        """Finish, for a run that ends by another error: an error of the save has been reported."""
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        if self._delivery is not None:
            await self._delivery.close()

    def take_metrics(self) -> dict[str, float]:
        """The metrics of a save that finished since the last call."""
        seconds, self._seconds = self._seconds, None
        return {} if seconds is None else {BACKGROUND: seconds}

    async def _write(
        self, place: CheckpointLocation, step: int, state: dict[str, Any], more: More | None, began: float
    ) -> None:
        held = time.monotonic()
        try:
            final = await self._write_all(place, step, state, more)
        except Exception as e:
            await asyncio.to_thread(self._run.outbox.discard, place)
            failure = e if isinstance(e, GrpoRayError) else self._failure(step, e)
            self._emit(MessageEvent("warning", f"{failure}; the run ends at its next checkpoint"))
            raise failure from e
        self._seconds = time.monotonic() - held
        if self._delivery is not None:
            self._delivery.offer(step)
        else:
            self._emit(CheckpointEvent(step, final.url, time.monotonic() - began))

    async def _write_all(
        self, place: CheckpointLocation, step: int, state: dict[str, Any], more: More | None
    ) -> CheckpointLocation:
        sums = dict(await self._learner.write(place))
        write_more = await more() if more is not None else None
        return await asyncio.to_thread(self._commit, place, step, state, write_more, sums)

    def _commit(
        self,
        place: CheckpointLocation,
        step: int,
        state: dict[str, Any],
        write_more: Callable[[Path], None] | None,
        sums: dict[str, FileSum],
    ) -> CheckpointLocation:
        with place.filling(LOOP) as (folder, of_loop):
            (folder / Path(LOOP_STATE).name).write_text(json.dumps(state))
            if write_more is not None:
                write_more(folder)
        # The delivery removes those that wait to be sent, since it knows what it is reading.
        keep = self._keep if self._delivery is None else None
        final = self._run.outbox.commit(place, step, sums | of_loop, keep=keep)
        self._run.link_export(final)
        return final

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        url = self._run.outbox.url
        folder = Path(url)
        free = f" ({shutil.disk_usage(folder).free / 1e9:.1f} GB free in {folder})" if folder.is_dir() else ""
        return CheckpointError(f"the checkpoint of step {step} could not be written to {url}{free}: {error}")
