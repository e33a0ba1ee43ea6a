"""Base of every training loop: steps, stop requests, checkpoints and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from grpo_ray.config.common import CommonConfig
from grpo_ray.data.epochs import RunLength
from grpo_ray.loop.roles import Learner
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.saver import More, Saver
from grpo_ray.telemetry.activity import Activity
from grpo_ray.telemetry.events import Event
from grpo_ray.telemetry.metrics import TimeKeeper
from grpo_ray.telemetry.timeline import Timeline
from grpo_ray.telemetry.tracking import Tracker

C = TypeVar("C", bound=CommonConfig)


class Session(Generic[C]):
    """Training run in one process, from its first step or a checkpoint to its last step or a stop."""

    def __init__(
        self,
        config: C,
        learner: Learner,
        length: RunLength,
        run: RunDir,
        trackers: Sequence[Tracker],
        emit: Callable[[Event], None],
    ) -> None:
        self.config = config
        self.run_dir = run
        self.trackers = trackers
        self.emit = emit
        self.step = 0
        """The number of steps done, which is also the policy version of the learner."""
        self.total_steps = length.num_steps
        """The number of steps of the run; fewer in the end if groups are dropped and the prompts used up before."""
        self._length = length
        self._saver = Saver(run, learner, keep=config.checkpoint.keep, emit=emit, store_s=config.deadlines.store_s)
        self._saved_step = -1
        self._checkpoint_wanted = False
        self._stop_reason: str | None = None
        self._activity = Activity("controller")
        self._time = TimeKeeper(activity=self._activity)
        self._timeline = Timeline(run.trace if config.tracking.trace else None)

    def stop(self, reason: str) -> None:
        """Stop after the step in progress, with a checkpoint."""
        self._stop_reason = reason

    def checkpoint_soon(self) -> None:
        """Save a checkpoint after the step in progress, and continue."""
        self._checkpoint_wanted = True

    @property
    def _is_fresh(self) -> bool:
        """Whether there is neither a step nor a checkpoint yet."""
        return self.step == 0 and self._saved_step < 0

    @property
    def _goes_on(self) -> bool:
        """Whether there is a next step."""
        return self.step < self.total_steps and self._stop_reason is None and not self._saver.gave_up

    @property
    def _end(self) -> str:
        """How the run ended: `finished`, or the reason of the stop."""
        return self._stop_reason if self.step < self.total_steps and self._stop_reason else "finished"

    def _due(self, every: int) -> bool:
        last = self.step == self.total_steps
        return last or (every > 0 and self.step % every == 0)

    def _checkpoint_is_due(self) -> bool:
        c = self.config.checkpoint
        return self._due(c.every_steps) or self._checkpoint_wanted or self._saver.is_late(c.every_minutes)

    async def _load(self, step: int, learner: Learner) -> dict[str, Any]:
        """Restore the learner as it was after `step`; returns what else was saved there."""
        state = self.run_dir.load_state(step)
        self._timeline.resume(step)
        await learner.load(self.run_dir.place(step))
        self.step = self._saved_step = step
        return state

    async def _save(self, state: dict[str, Any], *, export: bool, more: More | None = None) -> None:
        self._checkpoint_wanted = False
        with self._time.phase("checkpoint") as span:
            await self._saver.save(self.step, {"step": self.step, **state}, export=export, more=more)
        self._saved_step = self.step
        if self.step > 0:
            self._track({"time/checkpoint": span.seconds})

    async def _deliver(self) -> None:
        """Wait until the last checkpoint is at its destination."""
        await self._saver.deliver()
        self._track(self._saver.take_metrics())

    def _track(self, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.step, metrics)
