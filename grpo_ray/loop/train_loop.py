"""The RL training loop, written against `roles.py` without Ray, vLLM or DeepSpeed; a test runs it over plain objects.

    cursor -> dispatch -> sample x G -> score -> group complete ----+
       ^        (each sample scored the moment it is finished)      |
       |                                                            v
    new policy version <- weights <- learner <- batch of P groups <- advantages
                                                 (sorted by dispatch order)

`collect.py` implements the upper line, this file the lower one. While the last groups of a step are sampled, the learner gets the
finished ones (`overlap.py`). With dynamic sampling a group whose rewards are all equal is dropped and replaced by the next prompt.

`max_staleness` k paces dispatch: at most (k + 1) x P groups are in flight beyond what is trained. k = 0 is on-policy:
a batch is trained only by the version that sampled it, which is asserted when the batch is cut.

Policy versions and steps are one count: version n is the policy after step n, and `step` is the last one done.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from grpo_ray.algorithm.mismatch import mismatch_warning
from grpo_ray.algorithm.train_batch import cut_batch, set_advantages
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.epochs import run_length
from grpo_ray.errors import GrpoRayError, NonFiniteError, RewardError, WorkerError
from grpo_ray.health.untrained import why_untrained
from grpo_ray.health.watch import Health
from grpo_ray.loop.collect import Collector
from grpo_ray.loop.evaluate import eval_event, evaluate
from grpo_ray.loop.roles import Roles
from grpo_ray.loop.session import Session
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.replay import how_to_replay
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.advice import STEPS_LOOKED_AT, advise, mean_step
from grpo_ray.telemetry.events import Event, MessageEvent, PhaseEvent, StepEvent
from grpo_ray.telemetry.metrics import eval_metrics, step_metrics
from grpo_ray.telemetry.timeline import sampler_tokens_per_s
from grpo_ray.telemetry.tracking import Tracker
from grpo_ray.types import Group, Prompt, SyncReport, Track, TrainBatch, UpdateReport


class TrainLoop(Session[RunConfig]):
    """Training run that learns from the rewards of its own samples."""

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        cursor: Cursor[Prompt],
        eval_prompts: Mapping[str, Sequence[Prompt]],
        ledger: Ledger,
        run: RunDir,
        trackers: Sequence[Tracker],
        emit: Callable[[Event], None],
    ) -> None:
        length = run_length(config, len(cursor))
        super().__init__(config, roles.learner, length, run, trackers, emit)
        self.roles = roles
        self.eval_prompts = eval_prompts
        self.ledger = ledger
        self._health = Health(config)
        self.collector = Collector(config, roles, cursor, length, ledger, self._health, emit)
        self._evaluated_step = -1
        self._disagreed = False
        self._lines: deque[dict[str, float]] = deque(maxlen=STEPS_LOOKED_AT + 1)
        """The metrics of the last steps, for the advice."""

    async def restore(self, step: int) -> None:
        """Resume from a checkpoint: learner, rollout engines, cursor and ledger are restored to what they were after `step`."""
        state = await self._load(step, self.roles.learner)
        self._health.load_state_dict(state.get("health"))
        await self.collector.load_state_dict(state, step, self.run_dir.place(step))
        self.total_steps = self._length.steps_from(step, self.collector.num_left())
        await self.roles.weights.sync(step)

    async def run(self) -> str:
        """Train to the end, or until `stop`. Returns how it ended: `finished`, or the reason of the stop."""
        try:
            self._saver.send_leftovers()
            if self._is_fresh:
                await self._evaluate()
                await self._checkpoint(export=False)
            while self._goes_on:
                await self._scale_learners()
                await self._one_step()
                if self._health.gave_up:
                    break
                if self._due(self.config.eval.every_steps) and self._evaluated_step < self.step:
                    await self._evaluate()
                if self._checkpoint_is_due() and self._saved_step < self.step:
                    await self._checkpoint(export=self.config.checkpoint.export)
            if self.step != self._saved_step:
                await self._checkpoint(export=True)
            await self._deliver()
            self._tell_all(self._health.at_the_end(self.step))
            self._health.check(self.step, finished=self.step == self.total_steps)
            self._advise()
        finally:
            self._timeline.close(self.step, self._take_tracks())
            await self.collector.cancel()
            await self._saver.close()
        return self._end

    # One step, top to bottom

    async def _one_step(self) -> None:
        self._time.start_step()
        with self._time.phase("rollout"):
            try:
                groups = await self.collector.collect(self.step, self.total_steps)
            except WorkerError:
                await self._keep_what_is_done()
                raise
        if not groups:
            await self._end_here()
            return
        self.ledger.flush()
        set_advantages(groups, self.config.algorithm)
        batch = cut_batch(groups, self.step + 1, self.config)
        with self._time.phase("update"):
            self.emit(PhaseEvent("update", "", 0, 0))
            update = await self._update(groups, batch)
            if self.step == 0:
                # From here on the run is recorded, so there has to be a checkpoint to resume from.
                await self._saver.finish()
        self.step += 1
        untrained = why_untrained(groups, batch, self.config, update.metrics)
        self.ledger.trained(groups, self.step, untrained)
        with self._time.phase("sync"):
            sync = await self.roles.weights.sync(self.step)
        with self._time.phase("log"):
            await self.roles.rollout_log.write(self.step, groups, batch)
        self._record(groups, update, sync, untrained)

    async def _update(self, groups: list[Group], batch: TrainBatch) -> UpdateReport:
        """Update the learner. Raises NonFiniteError after the batch that caused it is on disk."""
        await self.collector.early.finish()
        try:
            return await self.roles.learner.update(batch)
        except NonFiniteError as e:
            await self.roles.rollout_log.write(batch.step, groups, batch)
            await self.roles.rollout_log.close()
            # The message depends on the checkpoint that may be being written.
            await self._saver.close()
            how = how_to_replay(self.run_dir, batch.step, recorded=self.config.tracking.rollouts)
            raise NonFiniteError(f"{e}. {how}") from None

    async def _keep_what_is_done(self) -> None:
        """Save a checkpoint of a run that ends without rollout engines or reward workers, while its learner ranks are alive."""
        if self.step > 0 and self._saved_step != self.step:
            with contextlib.suppress(GrpoRayError):
                await self.collector.early.finish()
                await self._checkpoint(export=False)
                await self._saver.finish()

    async def _end_here(self) -> None:
        """End the run here, since the prompts are used up before the steps are.

        Raises:
            RewardError: every group was dropped.
        """
        told = await self.collector.end()
        if self.step == 0:
            raise RewardError(f"{told}. Nothing was trained")
        self.emit(MessageEvent("info", told))
        self.total_steps = self.step

    async def _scale_learners(self) -> None:
        """Change the number of learner ranks through a checkpoint of the step that is done: sampling goes on, and the new ranks
        continue from the exact weights and optimizer states of the old ones.
        """
        scaler = self.roles.scaler
        if scaler is None or not scaler.wants_learners:
            return
        if self.step > 0:
            if self._saved_step != self.step:
                await self._checkpoint(export=False)
            await self._saver.finish()
            self._track(self._saver.take_metrics())
        place = self.run_dir.place(self.step) if self.step > 0 else None
        with self._time.phase("scale") as span:
            self.emit(PhaseEvent("scale", "learners", 0, 0))
            learner, weights = await scaler.change_learners(place)
        self.roles = replace(self.roles, learner=learner, weights=weights)
        self.collector.follow(learner)
        self._saver.follow(learner)
        self._track({"time/scale": span.seconds})

    async def _evaluate(self) -> None:
        """Evaluate every evaluation set in turn."""
        metrics = {"time/eval": 0.0}
        for name, prompts in self.eval_prompts.items():
            with self._time.phase("eval") as span:
                result = await evaluate(
                    prompts,
                    self.roles.sampler,
                    self.roles.scorer,
                    self.roles.voter,
                    self.config,
                    progress=partial(self._tell, "eval", name),
                    trainer=self.collector.trainer_state(self.step, self.total_steps),
                )
            metrics |= eval_metrics(result, name) | {"time/eval": metrics["time/eval"] + span.seconds}
            self.emit(eval_event(self.step, name, result))
            self._tell_all(self._health.after_eval(self.step, name, result))
        self._evaluated_step = self.step
        if self.eval_prompts:
            self._track(metrics)

    async def _checkpoint(self, *, export: bool) -> None:
        """Save a checkpoint with all finished groups; a resumed run samples the groups in flight again."""
        state = self.collector.state_dict() | {"health": self._health.state_dict()}
        await self._save(state, export=export, more=self.collector.finished_groups())

    # Records

    def _record(
        self, groups: list[Group], update: UpdateReport, sync: SyncReport, untrained: Mapping[str, str]
    ) -> None:
        counts, tally = self.collector.counts, self.collector.tally
        metrics = step_metrics(
            groups,
            update,
            sync,
            sampler_stats=self.roles.sampler.take_stats(),
            seconds=self._time.end_step(),
            dropped=counts.dropped,
            failed=counts.failed,
            untrained=untrained,
            ahead=self.config.algorithm.max_staleness > 0 or counts.from_checkpoint > 0,
        )
        metrics |= self._busy_metrics(metrics, [*update.tracks, *sync.tracks]) | self._saver.take_metrics()
        self._warn_of_mismatch(metrics.get("mismatch/mean_abs"))
        for group in groups:
            tally.add(group)
        notices = self._health.after_step(self.step, tally, len(groups), untrained, update.metrics)
        self._tell_all(notices)
        metrics["steps/without_signal"] = float(self._health.steps_without_signal)
        self._track(metrics)
        self._lines.append({"step": self.step, **metrics})
        if self.roles.scaler is not None:
            self.roles.scaler.after_step(self.step, metrics)
        self.emit(StepEvent(self.step, self.total_steps, metrics))

    def _busy_metrics(self, metrics: Mapping[str, float], learners: Sequence[Track]) -> dict[str, float]:
        tracks = self._take_tracks() | {"learner": learners}
        out = self._timeline.record(self.step, self._time.window, tracks)
        return out | sampler_tokens_per_s(metrics) | {"workers/shared": float(self.roles.shared_devices)}

    def _take_tracks(self) -> dict[str, Sequence[Track]]:
        """What every worker did since the last call; the tracks of learner ranks come with their reports."""
        return {
            "controller": [self._activity.take()],
            "rollout": self.roles.sampler.take_tracks(),
            "reward": self.roles.scorer.take_tracks(),
            "votes": self.roles.voter.take_tracks() if self.roles.voter else [],
        }

    def _warn_of_mismatch(self, mean_abs: float | None) -> None:
        """Warn each time that the bound is crossed, not at every step above it. None: no token of the step was sampled by these
        weights."""
        if mean_abs is None:
            return
        warning = mismatch_warning(mean_abs, self.config)
        if warning is not None and not self._disagreed:
            self.emit(MessageEvent("warning", warning))
        self._disagreed = warning is not None

    def _advise(self) -> None:
        if self._health.problem is not None:
            # Advice on speed does not help a run that does not learn.
            self.emit(MessageEvent("warning", self._health.problem))
            return
        times = mean_step(list(self._lines), self.config.model_dump())
        advice = advise(times) if times else None
        if advice is not None:
            self.emit(MessageEvent("info", advice.text))

    def _tell_all(self, messages: Sequence[MessageEvent]) -> None:
        for message in messages:
            self.emit(message)

    def _tell(self, phase: str, detail: str, done: int, total: int) -> None:
        self.emit(PhaseEvent(phase, detail, done, total))
