"""What a controller shares with the kind of run that it runs: facts of the run, what is in progress, and how to report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.control.scaler import RunScaler
from grpo_ray.loop.sft_loop import SftLoop
from grpo_ray.rewards.columns import ColumnNeeds
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import Event, MessageEvent, PhaseEvent

if TYPE_CHECKING:
    from grpo_ray.loop.train_loop import TrainLoop


@dataclass
class RunContext:
    """One run, as its controller and the function of its kind see it."""

    kind: str
    run: RunDir
    needs: Sequence[ColumnNeeds]
    """The columns that the rewards of this run need."""
    emit: Callable[[Event], None]
    """Sends an event to those who follow the run."""
    resume_step: int | None
    """The checkpoint from which the run continues; None: from the beginning. Recovery changes it."""
    stop_reason: str | None = None
    loop: TrainLoop | SftLoop[Any] | None = None
    """The training loop, once there is one."""
    scaler: RunScaler | None = None
    """The scaler that changes the numbers of workers, while there are some."""

    @property
    def step(self) -> int:
        """The number of finished steps; 0 before there is a loop."""
        return self.loop.step if self.loop is not None else 0

    def phase(self, phase: str, detail: str = "", done: int = 0, total: int = 0) -> None:
        self.emit(PhaseEvent(phase, detail, done, total))

    def inform(self, text: str) -> None:
        self.emit(MessageEvent("info", text))

    def warn(self, text: str) -> None:
        self.emit(MessageEvent("warning", text))
