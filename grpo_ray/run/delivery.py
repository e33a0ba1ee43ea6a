"""Upload of checkpoints to an object store in the background: they are written to the run's folder and sent from there.

    outbox/step-000040  --offer-->  [the newest that is waiting]  --send, again and again-->  store/step-000040

A store that does not answer, or refuses what it accepted before, causes a warning: training goes on, and only the newest checkpoint
waits. At most three are in the folder: one being sent, one waiting, one being written. The newest stays there until the run's end,
so that learner ranks that restart need no store.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grpo_ray.errors import CheckpointError, StoreAwayError, StoreError
from grpo_ray.object_store import FIRST_WAIT_S, LONGEST_WAIT_S, reason
from grpo_ray.run.checkpoint_store import Store
from grpo_ray.telemetry.events import CheckpointEvent, Event, MessageEvent

LOOK_S = 1.0
"""The interval in seconds at which a silent upload is checked."""


class _Stopped(CheckpointError):
    """The run ends; a resumed run sends the rest."""


@dataclass
class _Sending:
    """One upload attempt, in a thread that cannot be killed and is asked to stop."""

    heard_at: float
    stopped: threading.Event

    def beat(self) -> None:
        if self.stopped.is_set():
            raise _Stopped("not sent: the run has ended")
        self.heard_at = time.monotonic()


class Delivery:
    """Uploader of one checkpoint at a time. Its methods are called on one event loop."""

    def __init__(
        self, outbox: Store, store: Store, *, keep: int, limit_s: float, emit: Callable[[Event], None]
    ) -> None:
        """Create the uploader.

        Args:
            keep: the number of newest checkpoints that stay in the store.
            limit_s: how long the store may be silent before it is given up (deadlines.store_s).
        """
        self._outbox = outbox
        # Retries are made here, where they end with the run.
        self._store = Store(store.url, patience_s=0)
        self._keep = keep
        self._limit_s = limit_s
        self._emit = emit
        self._waiting: int | None = None
        self._sending: _Sending | None = None
        self._sent_step: int | None = None
        """The step that is being sent."""
        self._began: dict[int, float] = {}
        self._work: asyncio.Task[None] | None = None
        self._away_since: float | None = None
        self._clutter = ""
        self.gave_up: str | None = None
        """The reason why the store was given up."""

    def offer(self, step: int) -> None:
        """Queue a checkpoint that is complete in the outbox. One that still waits there is not sent any more."""
        skipped = self._waiting is not None and self._waiting not in (step, self._sent_step)
        if skipped and self._away_since is None:
            self._emit(
                MessageEvent(
                    "info",
                    f"the checkpoint of step {self._waiting} is not sent to {self._store.url}: that of step {step} is newer",
                )
            )
        self._waiting = step
        self._began[step] = time.monotonic()
        self._outbox.remove(s for s in self._outbox.steps() if s < step and s != self._sent_step)
        if self._work is None and self.gave_up is None:
            self._work = asyncio.create_task(self._deliver())

    def offer_leftovers(self) -> None:
        """Queue what an earlier start of the run could not send."""
        if left := self._outbox.steps():
            self.offer(left[-1])

    async def finish(self) -> None:
        """Wait until everything is in the store and nothing is in the outbox any more.

        Raises:
            StoreError: the store was given up; the newest checkpoint is in the outbox.
        """
        if self._work is not None:
            await self._work
        if self.gave_up is not None:
            raise StoreError(self.gave_up)
        self._outbox.remove(self._outbox.steps())
        if not any(Path(self._outbox.url).glob("*")):
            shutil.rmtree(self._outbox.url, ignore_errors=True)

    async def close(self) -> None:
        """Stop; what is not uploaded yet stays in the outbox."""
        if self._sending is not None:
            self._sending.stopped.set()
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = None

    async def _deliver(self) -> None:
        sent: dict[int, set[str]] = {}
        heard_at, wait_s = time.monotonic(), FIRST_WAIT_S
        while (step := self._waiting) is not None:
            self._sent_step = step
            # The first attempt of this checkpoint removes a half-sent other one.
            sent = {step: sent.get(step, set())}
            had = len(sent[step])
            try:
                heard_at = await self._send(step, sent[step], heard_at)
            except Exception as e:
                if self._sending is not None:
                    heard_at = max(heard_at, self._sending.heard_at)
                if len(sent[step]) > had:
                    wait_s = FIRST_WAIT_S
                left_s = heard_at + self._limit_s - time.monotonic()
                if not self._is_worth_waiting(e, step, heard_at, left_s):
                    break
                await asyncio.sleep(min(wait_s, left_s))
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                continue
            finally:
                self._sent_step = None
            self._arrived(step)
            heard_at, wait_s = time.monotonic(), FIRST_WAIT_S
        self._sending = self._work = None

    async def _send(self, step: int, sent: set[str], heard_at: float) -> float:
        """Make one attempt. Raises its exception, or TimeoutError when nothing was transferred within the limit."""
        self._sending = sending = _Sending(heard_at, threading.Event())

        def send() -> None:
            self._store.send(self._outbox.place(step), step, sent, beat=sending.beat)
            self._clear_store(step)

        attempt = asyncio.create_task(asyncio.to_thread(send))
        try:
            while True:
                done, _ = await asyncio.wait({attempt}, timeout=LOOK_S)
                if done:
                    await attempt
                    return sending.heard_at
                if time.monotonic() - sending.heard_at > self._limit_s:
                    raise TimeoutError(f"nothing went through for {self._limit_s:g} s")
        finally:
            sending.stopped.set()
            # Reports of an abandoned thread are ignored.
            attempt.add_done_callback(lambda task: task.cancelled() or task.exception())

    def _clear_store(self, step: int) -> None:
        """Remove older checkpoints in the store. A failure only costs space, and is reported once."""
        try:
            self._store.keep_newest(self._keep, step)
        except StoreAwayError:
            raise
        except (CheckpointError, OSError) as e:
            text = f"older checkpoints than the newest {self._keep} were not removed: {reason(e)}"
            if not self._clutter:
                self._clutter = text

    def _is_worth_waiting(self, error: Exception, step: int, heard_at: float, left_s: float) -> bool:
        """Report the first failure; returns False when the store is given up."""
        why = str(error) if isinstance(error, CheckpointError) else reason(error)
        place = self._outbox.place(step).url
        if not self._outbox.has(step):
            self._give_up(f"the checkpoint of step {step} is gone from {place} before it was sent to {self._store.url}")
            return False
        if left_s <= 0:
            self._give_up(
                f"checkpoints could not be sent to {self._store.url} for {self._limit_s:g} s (deadlines.store_s): {why}"
            )
            return False
        if self._away_since is None:
            self._away_since = heard_at
            self._emit(
                MessageEvent(
                    "warning",
                    f"the checkpoint of step {step} can't be sent: {why}. It is in {place} and is sent when that works again; "
                    f"training goes on meanwhile, for deadlines.store_s ({self._limit_s:g} s) at most",
                )
            )
        return True

    def _give_up(self, text: str) -> None:
        self.gave_up = text
        self._emit(MessageEvent("warning", f"{text}; the run ends after this step, with a checkpoint in its folder"))

    def _arrived(self, step: int) -> None:
        if self._waiting == step:
            self._waiting = None
        else:
            self._outbox.remove([s for s in self._outbox.steps() if s == step])
        if self._away_since is not None:
            away_s, self._away_since = time.monotonic() - self._away_since, None
            self._emit(
                MessageEvent(
                    "info",
                    f"{self._store.url} answers again after {away_s:.0f} s; the checkpoint of step {step} is there",
                )
            )
        if self._clutter and self._clutter != "told":
            self._emit(MessageEvent("warning", self._clutter))
            self._clutter = "told"
        began = self._began.pop(step, time.monotonic())
        self._emit(CheckpointEvent(step, self._store.place(step).url, time.monotonic() - began))
