"""The named actor that owns a run: it runs the function of its kind, keeps its events, and takes commands.

    driver (launch/run/follow.py)  -- run, events, stop -->  Controller  --> run_*.py --> pools (workers.py) --> actors
    command line                          -- scale -->

The driver may vanish and come back; the run lives here. Only references and small records pass through it.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from actors.control.context import RunContext
from actors.control.kinds.evaluate import run_evaluate
from actors.control.kinds.grpo import run_grpo
from actors.control.kinds.replay import run_replay
from actors.control.kinds.sample import run_sample
from actors.control.kinds.supervised import run_supervised
from actors.control.owner import controller_of, folders_of
from actors.control.recovery import error_message
from actors.runtime import use_batch_scheduling
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.names import check_name, run_name
from grpo_ray.plain_terminal import say
from grpo_ray.rewards.columns import ColumnNeeds
from grpo_ray.run.ended import write_ended
from grpo_ray.run.ownership import holding
from grpo_ray.run.run_dir import RunDir
from grpo_ray.secrets import hide_secrets
from grpo_ray.telemetry.events import EndEvent, Event, EventLog, MessageEvent
from grpo_ray.telemetry.messages import MessageLog

LINGER_S = 30.0
"""How long a controller whose run has ended waits for someone to read its end before it exits."""


@dataclass(frozen=True)
class RunKind:
    """What a kind of run takes and does."""

    config: type[RunConfig] | type[SftConfig]
    run: Callable[[RunContext, Any], Awaitable[str]]
    """The function that does the whole run; it returns how the run ended."""
    has_report: bool = False
    """Whether messages of the run are kept for its report."""


RUN_KINDS = {
    "grpo": RunKind(RunConfig, run_grpo, has_report=True),
    "sft": RunKind(SftConfig, run_supervised, has_report=True),
    "dpo": RunKind(SftConfig, run_supervised, has_report=True),
    "reward_model": RunKind(SftConfig, run_supervised, has_report=True),
    "eval": RunKind(RunConfig, run_evaluate),
    "sample": RunKind(RunConfig, run_sample),
    "replay": RunKind(RunConfig, run_replay),
}


class Controller:
    """One run. The methods are coroutines on one event loop: `stop` and `events` answer while `run` is in progress."""

    def __init__(
        self,
        kind: str,
        config: RunConfig | SftConfig,
        run_dir: str,
        resume_step: int | None,
        needs: Sequence[ColumnNeeds] = (),
        detached: bool = False,
    ) -> None:
        use_batch_scheduling()
        self._config = config
        self._kind = RUN_KINDS[kind]
        self._run = RunDir(Path(run_dir)).with_checkpoints(config.checkpoint.path, config.deadlines.store_s)
        self._context = RunContext(kind, self._run, needs, self._emit, resume_step)
        self._detached = detached
        self._lost: str | None = None
        self._events = EventLog()
        self._messages = MessageLog(self._run.path) if self._kind.has_report else None
        self._news = asyncio.Event()
        self._work: asyncio.Task[str] | None = None

    async def run(self) -> None:
        """Run from start to end. The last event states how it ended; this never raises."""
        self._work = asyncio.create_task(self._alone())
        try:
            reason = await self._work
            end = EndEvent(reason, "")
        except asyncio.CancelledError:
            end = (
                EndEvent("failed", self._lost) if self._lost else EndEvent(self._context.stop_reason or "cancelled", "")
            )
        except BaseException as e:
            end = EndEvent("failed", hide_secrets(error_message(e)))
            say(hide_secrets(traceback.format_exc()), error=True)
        if self._context.scaler is not None:
            await self._context.scaler.close()
            self._context.scaler = None
        self._keep_end(end)
        self._emit(end)
        self._leaving = asyncio.create_task(self._leave())

    def _keep_end(self, end: EndEvent) -> None:
        """Record how the run ended for `resume`, which need not start anything then. A full disk is reported by what has to be
        written."""
        loop = self._context.loop
        if self._messages is not None and loop is not None:
            with contextlib.suppress(OSError):
                write_ended(self._run.path, self._config, end.status, end.text, loop.step, loop.total_steps)

    async def _leave(self) -> None:
        """Exit: nobody else ends a detached actor, and the name of its run must become free."""
        await asyncio.sleep(LINGER_S)
        ray.kill(ray.get_runtime_context().current_actor)

    async def events(self, after: int, wait_s: float) -> tuple[list[Event], int]:
        """The events from number `after` on, and the number to ask from next time; waits up to `wait_s` for one."""
        if self._events.count <= after:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except TimeoutError:
                return [], after
        return self._events.since(after), self._events.count

    async def stop(self, reason: str, now: bool = False) -> None:
        """End after the step in progress, with a checkpoint; before the first step, or `now`, at once.

        Raises:
            ConfigError: the reason is not a single word, as the run's status has to be.
        """
        self._context.stop_reason = check_name(reason, "the reason of a stop")
        if self._context.loop is not None and not now:
            self._context.loop.stop(reason)
        elif self._work is not None:
            self._work.cancel()

    async def scale(self, words: Sequence[str]) -> str:
        """See `RunScaler.scale`.

        Raises:
            ConfigError: as there; or the run has no workers at the moment, or is not one of `grpo-ray train`.
        """
        if self._context.scaler is None:
            kind = self._context.kind
            raise ConfigError(
                f"{run_name(self._run.path)} can't be scaled: "
                + ("it has no workers, yet or any more" if kind == "grpo" else f"it is a run of `{kind}`")
            )
        return await self._context.scaler.scale(words)

    def _emit(self, event: Event) -> None:
        if isinstance(event, MessageEvent):
            event = replace(event, text=hide_secrets(event.text))
        if self._messages is not None:
            match event:
                case MessageEvent():
                    self._messages.add(self._context.step, event.level, event.text)
                case EndEvent(status="failed"):
                    self._messages.add(self._context.step, "error", event.text)
        self._events.add(event)
        self._news.set()

    async def _alone(self) -> str:
        """Run while no other process writes in the run's folders. If one does, nothing is written to them."""
        messages, self._messages = self._messages, None
        here = asyncio.get_running_loop()

        def tell(text: str) -> None:
            here.call_soon_threadsafe(self._context.warn, text)

        def lose(reason: str) -> None:
            here.call_soon_threadsafe(self._lose, reason)

        me = controller_of(run_name(self._run.path), self._context.kind, detached=self._detached)
        held = holding(folders_of(self._run, self._context.kind), me, tell, lose)
        await asyncio.to_thread(held.__enter__)
        self._messages = messages
        try:
            return await self._run_kind()
        finally:
            await asyncio.to_thread(held.__exit__, None, None, None)

    def _lose(self, reason: str) -> None:
        self._lost, self._messages = reason, None
        if self._work is not None:
            self._work.cancel()

    async def _run_kind(self) -> str:
        if not isinstance(self._config, self._kind.config):
            raise ConfigError(f"no run of kind {self._context.kind} with a {type(self._config).__name__}")
        return await self._kind.run(self._context, self._config)
