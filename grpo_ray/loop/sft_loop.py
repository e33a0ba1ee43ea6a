"""Supervised fine-tuning with the learner of the RL loop: batches of demonstrations, the same checkpoints and metrics."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.epochs import run_length
from grpo_ray.data.prompts import SftExample
from grpo_ray.loop.roles import Learner
from grpo_ray.loop.session import Session
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import Event, MessageEvent, PhaseEvent, StepEvent
from grpo_ray.telemetry.tracking import Tracker
from grpo_ray.types import Sample, TrainBatch, TrainSample, VersionSpan

E = TypeVar("E")


class SftLoop(Session[SftConfig], Generic[E]):
    """Training run on examples."""

    def __init__(
        self,
        config: SftConfig,
        learner: Learner,
        cursor: Cursor[E],
        run: RunDir,
        trackers: Sequence[Tracker],
        emit: Callable[[Event], None],
        batch_of: Callable[[int, Sequence[E]], TrainBatch],
        measure: Callable[[], Awaitable[dict[str, float]]] | None = None,
    ) -> None:
        """Create the loop: `batch_of` turns (number of the step, examples) into a batch; `measure` returns held-out figures, and is
        called before the first step and after the last.
        """
        super().__init__(config, learner, run_length(config, len(cursor)), run, trackers, emit)
        self.learner = learner
        self.cursor = cursor
        self.batch_of = batch_of
        self.measure = measure

    async def restore(self, step: int) -> None:
        state = await self._load(step, self.learner)
        self.cursor.load_state_dict(state["cursor"])
        self.total_steps = self._length.steps_from(step, self._length.num_left(self.cursor.num_taken))

    async def run(self) -> str:
        """Train to the end, or until `stop`. Returns how it ended: `finished`, or the reason of the stop."""
        try:
            self._saver.send_leftovers()
            if self._is_fresh:
                await self._measure()
                await self._checkpoint(export=False)
            while self._goes_on:
                await self._one_step()
                if self.step < self.total_steps and self._checkpoint_is_due():
                    await self._checkpoint(export=self.config.checkpoint.export)
            if self.step == self.total_steps:
                await self._measure()
            if self.step != self._saved_step:
                await self._checkpoint(export=True)
            await self._deliver()
        finally:
            await self._saver.close()
            self._timeline.close(self.step, {"controller": [self._activity.take()]})
        return self._end

    async def _one_step(self) -> None:
        self._time.start_step()
        with self._time.phase("update"):
            number = self._length.next_batch(self._length.num_left(self.cursor.num_taken))
            batch = self.batch_of(self.step + 1, [self.cursor.next() for _ in range(number)])
            update = await self.learner.update(batch)
            if self.step == 0:
                # From here on the run is recorded, so there has to be a checkpoint to resume from.
                await self._saver.finish()
        self.step += 1
        seconds = self._time.end_step()
        tokens = sum(s.num_prompt_tokens + s.num_tokens for s in batch.samples)
        metrics = {
            **update.metrics,
            "completions/mean_length": sum(s.num_tokens for s in batch.samples) / len(batch.samples),
            "time/step": seconds["step"],
            "time/update": seconds["update"],
            "throughput/tokens_per_s": tokens / seconds["step"],
        }
        tracks = {"controller": [self._activity.take()], "learner": update.tracks}
        metrics |= self._timeline.record(self.step, self._time.window, tracks)
        metrics |= self._saver.take_metrics()
        self._track(metrics)
        self.emit(StepEvent(self.step, self.total_steps, metrics))

    async def _measure(self) -> None:
        if self.measure is None:
            return
        with self._time.phase("eval") as span:
            metrics = await self.measure()
        self._track(metrics | {"time/eval": span.seconds})
        told = ", ".join(f"{name.removeprefix('eval/')} {value:.4g}" for name, value in metrics.items())
        self.emit(MessageEvent("info", f"held out after step {self.step}: {told}"))

    async def _checkpoint(self, *, export: bool) -> None:
        self.emit(PhaseEvent("checkpoint", "", 0, 0))
        await self._save({"cursor": self.cursor.state_dict()}, export=export)


def sft_batch(step: int, examples: Sequence[SftExample]) -> TrainBatch:
    """A batch of demonstrations in the form of samples, whose completions were written instead of sampled."""
    rows = [
        Sample(
            prompt_id=e.id,
            index=0,
            prompt_token_ids=np.asarray(e.prompt_ids, dtype=np.int32),
            token_ids=np.asarray(e.completion_ids, dtype=np.int32),
            logprobs=np.zeros(len(e.completion_ids), dtype=np.float32),
            versions=(VersionSpan(step - 1, 0, len(e.completion_ids)),),
            finish_reason="stop",
            text="",
        )
        for e in examples
    ]
    samples = [
        TrainSample(
            ref=rows,
            row=i,
            prompt_id=e.id,
            index=0,
            num_prompt_tokens=len(e.prompt_ids),
            num_tokens=len(e.completion_ids),
            group=i,
        )
        for i, e in enumerate(examples)
    ]
    return TrainBatch(step=step, samples=samples, temperature=1.0)
