"""The loop, over `roles.py`: it knows no Ray, no vLLM and no DeepSpeed, and runs over plain objects in a test.

    cursor -> dispatch -> sample x G -> score -> group complete ----+
       ^        (each sample scored the moment it is finished)      |
       |                                                            v
    new policy version <- weights <- learner <- batch of P groups <- advantages
                                                 (sorted by dispatch order)

While the last groups of a step are sampled, the learner is given the finished ones (`overlap.py`).

With dynamic sampling a group whose rewards are all equal is dropped there, and the next prompt dispatched in its place.

`max_staleness` k paces dispatch: at most (k + 1) x P groups are under way beyond what is trained. k = 0 is on-policy:
a batch is trained only by the version that sampled it, which is asserted when the batch is cut.

Policy versions and steps are one count: version v is the policy after v steps.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_ray.activity import Activity
from grpo_ray.advice import STEPS_LOOKED_AT, advise, mean_step
from grpo_ray.carried import Carried, how_sampled
from grpo_ray.checkpoint import RunDir
from grpo_ray.config import RunConfig
from grpo_ray.cursor import Cursor
from grpo_ray.epochs import run_length, used_up
from grpo_ray.errors import GrpoRayError, NonFiniteError, PoisonedError, RewardError, WorkerError
from grpo_ray.evaluate import eval_event, evaluate
from grpo_ray.events import Event, MessageEvent, PhaseEvent, StepEvent
from grpo_ray.filling import Filling
from grpo_ray.health import Health
from grpo_ray.kept_groups import KEPT_GROUPS, KeptGroup, read_groups, write_groups
from grpo_ray.ledger import Ledger, LedgerRow
from grpo_ray.metrics import TimeKeeper, eval_metrics, step_metrics
from grpo_ray.mismatch import mismatch_warning
from grpo_ray.overlap import EarlyParts
from grpo_ray.replay import how_to_replay
from grpo_ray.roles import InMemory, Learner, RolloutLog, Sampler, SampleStore, Scaler, Scorer, Tracker, WeightSync
from grpo_ray.rollout_log import distinct_refs
from grpo_ray.saver import Saver
from grpo_ray.seeds import sample_seed
from grpo_ray.spread import has_spread
from grpo_ray.tally import Tally
from grpo_ray.timeline import Timeline, sampler_tokens_per_s
from grpo_ray.train_batch import cut_batch, set_advantages
from grpo_ray.types import (
    Group,
    Prompt,
    SampleRequest,
    SamplingParams,
    Score,
    SyncReport,
    Track,
    TrainBatch,
    TrainerState,
    UpdateReport,
)
from grpo_ray.untrained import why_untrained

NO_SIGNAL = "no_signal"
"""Why dynamic sampling dropped a group."""
POISONED = "poisoned"
"""Why a group is dropped whose prompt ends engines."""
LAST_BATCH = "last_batch"
"""Why a group is dropped that is left over at the end, where `data.last_batch` is `drop`."""


@dataclass(frozen=True)
class Roles:
    sampler: Sampler
    scorer: Scorer
    learner: Learner
    weights: WeightSync
    rollout_log: RolloutLog
    samples: SampleStore = field(default_factory=InMemory, kw_only=True)
    voter: Scorer | None = None
    """Tells which answers of an evaluation are the same; see `grpo_ray.evaluate.vote_config`."""
    shared_devices: bool = False
    """Samplers and learners use the same ones: what one wins by working at the same time, the other loses."""
    scaler: Scaler | None = field(default=None, kw_only=True)


@dataclass
class StepCounts:
    """What happened while the batch of one step was collected."""

    scored: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    """Reward function -> failed scores."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> groups."""
    last_failure: str = ""
    from_checkpoint: int = 0
    """Groups that were sampled in an earlier life of the run."""


class TrainLoop:
    """One run from its first step, or from a checkpoint, to its last."""

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        cursor: Cursor,
        eval_prompts: Mapping[str, Sequence[Prompt]],
        ledger: Ledger,
        run: RunDir,
        trackers: Sequence[Tracker],
        emit: Callable[[Event], None],
    ) -> None:
        self.config = config
        self.roles = roles
        self.cursor = cursor
        self.eval_prompts = eval_prompts
        self.ledger = ledger
        self.run_dir = run
        self.trackers = trackers
        self.emit = emit
        self.step = 0
        """Steps done; also the policy version of the learner."""
        self._length = run_length(config, len(cursor))
        self.total_steps = self._length.num_steps
        """Fewer in the end, if groups are dropped and the prompts used up before."""
        self._order = 0
        self._under_way: dict[asyncio.Future[None], Group] = {}
        """In dispatch order."""
        self._finished: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
        """Those that ended and are not settled, and parts that the learner is through with."""
        self._early = EarlyParts(config, roles.learner, self._finished.put_nowait)
        self._ready: list[Group] = []
        """Complete, and not yet in a batch; in dispatch order."""
        self._cursor_at: dict[int, dict[str, Any]] = {}
        """Order of each group under way or ready, ascending -> the cursor just before it: where a resumed run begins again."""
        self._carried = Carried()
        self._counts = StepCounts()
        self._health = Health(config)
        self._tally: Tally = self._health.tally()
        """Of the step under way; meanwhile, of the groups that dynamic sampling leaves out."""
        self._saver = Saver(
            run, roles.learner, keep=config.checkpoint.keep, emit=emit, store_s=config.deadlines.store_s
        )
        self._stop_reason: str | None = None
        self._saved_step = self._evaluated_step = -1
        self._checkpoint_wanted = False
        self._disagreed = False
        self._activity = Activity("controller")
        self._time = TimeKeeper(activity=self._activity)
        self._timeline = Timeline(run.trace if config.tracking.trace else None)
        self._lines: deque[dict[str, float]] = deque(maxlen=STEPS_LOOKED_AT + 1)
        """The metrics of the last steps, for the advice."""
        self._params = SamplingParams(
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            min_p=config.rollout.min_p,
            max_tokens=config.rollout.max_completion_length,
            stop=config.rollout.stop,
            stop_token_ids=config.rollout.stop_token_ids,
        )
        self._sampling = how_sampled(config, self._params)

    def stop(self, reason: str) -> None:
        """End after the step under way, with a checkpoint."""
        self._stop_reason = reason

    def checkpoint_soon(self) -> None:
        """After the step under way, and go on."""
        self._checkpoint_wanted = True

    async def restore(self, step: int) -> None:
        """Go on from a checkpoint: the learner, the samplers, the cursor and the ledger are as they were after `step`."""
        state = self.run_dir.load_state(step)
        self._timeline.resume(step)
        await self.roles.learner.load(self.run_dir.place(step))
        self.cursor.load_state_dict(state["cursor"])
        self.step = self._saved_step = step
        self._order = state["order"]
        forgotten = self.ledger.roll_back(step, self._order)
        dropped = [LedgerRow(**row) for row in state["dropped"]]
        self.ledger.put_back(dropped)
        self._health.load_state_dict(state.get("health"))
        kept = await asyncio.to_thread(self._read_kept, step) if state["sampling"] == self._sampling else []
        self._carried, too_old = Carried.of(kept, dropped, self._order, step, self.config)
        again = forgotten - len(dropped) - len(self._carried.groups)
        if self._carried.groups or again > 0:
            self.emit(
                MessageEvent(
                    "info",
                    f"{len(self._carried.groups)} finished groups are taken from the checkpoint; {max(again, 0)} groups after "
                    f"step {step} will be sampled again"
                    + (f", {too_old} since they are too old now" if too_old else ""),
                )
            )
        self.total_steps = self._length.steps_from(step, self._num_left())
        await self.roles.weights.sync(step)

    def _read_kept(self, step: int) -> list[KeptGroup]:
        with self.run_dir.place(step).reading() as files:
            return read_groups(files.local(KEPT_GROUPS))

    async def run(self) -> str:
        """Train to the end, or until `stop`. Returns how it ended: `finished`, or the reason of the stop."""
        try:
            self._saver.send_leftovers()
            if self.step == 0 and self._saved_step < 0:
                await self._evaluate()
                await self._checkpoint(export=False)
            while self.step < self.total_steps and self._stop_reason is None and not self._saver.gave_up:
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
            await self._saver.deliver()
            self._track(self._saver.take_metrics())
            self._tell_all(self._health.at_the_end(self.step))
            self._health.check(self.step, finished=self.step == self.total_steps)
            self._advise()
        finally:
            self._timeline.close(self.step, self._take_tracks())
            for filling in self._under_way:
                filling.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            await self._early.cancel()
            await self._saver.close()
        return self._stop_reason if self.step < self.total_steps and self._stop_reason else "finished"

    def _due(self, every: int) -> bool:
        last = self.step == self.total_steps
        return last or (every > 0 and self.step % every == 0)

    def _checkpoint_is_due(self) -> bool:
        c = self.config.checkpoint
        return self._due(c.every_steps) or self._checkpoint_wanted or self._saver.is_late(c.every_minutes)

    # One step, top to bottom.

    async def _one_step(self) -> None:
        self._time.start_step()
        self._counts, self._tally = StepCounts(), self._health.tally()
        with self._time.phase("rollout"):
            try:
                groups = await self._collect()
            except WorkerError:
                await self._keep_what_is_done()
                raise
        if not groups:
            await self._end_here()
            return
        self.ledger.flush()
        set_advantages(groups, self.config.algorithm)
        batch = cut_batch(groups, self.step, self.config)
        with self._time.phase("update"):
            self.emit(PhaseEvent("update", "", 0, 0))
            update = await self._update(groups, batch)
            if self.step == 0:
                # From here on something is recorded, and that needs a checkpoint to go on from.
                await self._saver.finish()
        self.step += 1
        untrained = why_untrained(groups, batch, self.config, update.metrics)
        self.ledger.trained(groups, self.step, untrained)
        with self._time.phase("sync"):
            sync = await self.roles.weights.sync(self.step)
        with self._time.phase("log"):
            await self.roles.rollout_log.write(self.step, groups, batch)
        self._record(groups, update, sync, untrained)

    async def _keep_what_is_done(self) -> None:
        """Of a run that ends for want of samplers or scorers, with learners that live."""
        if self.step > 0 and self._saved_step != self.step:
            with contextlib.suppress(GrpoRayError):
                await self._early.finish()
                await self._checkpoint(export=False)
                await self._saver.finish()

    async def _scale_learners(self) -> None:
        """Through a checkpoint of the step that is done: what is under way is sampled on, and the new learners go on from the very
        weights and optimizer states that the old ones had."""
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
        self._early = EarlyParts(self.config, learner, self._finished.put_nowait)
        self._saver = Saver(self.run_dir, learner, keep=self.config.checkpoint.keep, emit=self.emit)
        self._track({"time/scale": span.seconds})

    async def _collect(self) -> list[Group]:
        """The next P complete groups in dispatch order; fewer, but at least one, when the budget of dynamic sampling is spent, or
        the prompts are; none when there is no batch any more. Meanwhile the learner works on those of them that are there.

        Always the oldest: however samples overtake each other, batches are the same, and no group waits for more than
        `max_staleness` steps.
        """
        while True:
            available = self._length.next_batch(self._num_left(), len(self._ready) + len(self._under_way))
            if not available:
                return []
            wanted = min(self._wanted(), available)
            self._dispatch(wanted)
            if self._num_oldest_ready() >= wanted:
                break
            if self._early.wants_more:
                self._early.offer(self._certain(wanted), self.step)
            finished = await self._finished.get()
            if finished in self._under_way:
                self._settle(self._under_way.pop(finished), finished)
            self.emit(PhaseEvent("rollout", "", min(len(self._ready), wanted), wanted))
        if not wanted:
            raise RewardError(
                f"step {self.step + 1}: none of {self._counts.dropped[NO_SIGNAL]} groups has two different rewards, which "
                f"algorithm.dynamic_sampling asks for: {self._health.why_all_dropped(self.step + 1, self._tally)}"
            )
        batch, self._ready = self._ready[:wanted], self._ready[wanted:]
        for group in batch:
            del self._cursor_at[group.order]
        return batch

    def _num_oldest_ready(self) -> int:
        """Those that nothing under way was dispatched before, which are the first of `_ready`."""
        oldest = next((g.order for g in self._under_way.values()), self._order)
        return bisect.bisect_left(self._ready, oldest, key=_order)

    def _certain(self, wanted: int) -> list[Group]:
        """Complete groups that this step's batch will hold: fewer than `wanted` can come before them."""
        *_, last = islice(self._cursor_at, wanted)
        return self._ready[: bisect.bisect_right(self._ready, last, key=_order)]

    def _settle(self, group: Group, filling: asyncio.Future[None]) -> None:
        try:
            filling.result()
        except PoisonedError as e:
            self._leave_out(group)
            self.ledger.dropped(group, self.step + 1, POISONED)
            self._counts.dropped[POISONED] = self._counts.dropped.get(POISONED, 0) + 1
            instead = ", and the next prompt takes its place" if self._num_left() else ""
            self.emit(MessageEvent("error", f"{e}. It is set aside{instead}"))
            return
        self.ledger.sampled(group)
        if self._keep(group) and self._has_signal(group):
            bisect.insort(self._ready, group, key=_order)
            self._early.came(group)
        else:
            self._leave_out(group)

    def _leave_out(self, group: Group) -> None:
        """Of every batch: others take its place."""
        del self._cursor_at[group.order]
        self._early.look_again()

    def _num_left(self) -> float:
        """Prompts that may still be begun."""
        return self._length.num_left(self._order, self._carried.dropped)

    async def _end_here(self) -> None:
        """The prompts are used up before the steps are: groups were dropped.

        Raises:
            RewardError: every one was.
        """
        await self._early.finish()
        for group in (*self._ready, *self._under_way.values()):
            self._leave_out(group)
            self.ledger.dropped(group, self.step + 1, LAST_BATCH)
        for filling in self._under_way:
            filling.cancel()
        self._ready, self._under_way = [], {}
        told = used_up(self.config, self.step, self.total_steps, self.ledger.summary().drop_reasons)
        if self.step == 0:
            raise RewardError(f"{told}. Nothing was trained")
        self.emit(MessageEvent("info", told))
        self.total_steps = self.step

    def _wanted(self) -> int:
        """Groups of this step's batch. Each group without signal beyond the budget of dynamic sampling makes it one smaller
        instead of being replaced; which groups are in it never depends on the order in which they were finished."""
        a, size = self.config.algorithm, self.config.prompts_per_step
        if not a.dynamic_sampling:
            return size
        unreplaced = self._counts.dropped.get(NO_SIGNAL, 0) - (a.max_sampling_rounds - 1) * size
        # Sampling ahead may have spent the budget with groups for later steps complete: those are not lost.
        return max(size - max(0, unreplaced), min(size, self._num_oldest_ready()), self._num_due())

    def _num_due(self) -> int:
        """Groups that have to be in this step's batch, or some would be left when their staleness bound has come: one that is
        due j steps later needs all before it trained as well by then, and a step trains P at most."""
        bound, size = self.config.algorithm.max_staleness, self.config.prompts_per_step
        groups = sorted((*self._ready, *self._under_way.values()), key=_order)
        last_steps = (max(g.dispatched_version + bound - self.step, 0) for g in groups)
        return max((place + 1 - j * size for place, j in enumerate(last_steps)), default=0)

    def _dispatch(self, wanted: int) -> None:
        """Start as many groups as the staleness bound allows: those that a later step would train too late are not begun, nor
        those that no step would train."""
        ahead = min(self.config.algorithm.max_staleness, self.total_steps - self.step - 1)
        allowed = wanted + ahead * self.config.prompts_per_step
        fresh = []
        num_fresh = min(allowed - len(self._ready) - len(self._under_way), self._num_left())
        for _ in range(int(num_fresh)):
            while self._order in self._carried.dropped:
                self.cursor.next()
                self._order += 1
            self._cursor_at[self._order] = self.cursor.state_dict()
            kept = self._carried.groups.get(self._order)
            version = kept.dispatched_version if kept else self.step
            fresh.append(Group(prompt=self.cursor.next(), order=self._order, dispatched_version=version))
            self._order += 1
        if not fresh:
            return
        self.ledger.dispatched(fresh)
        begun = fresh
        if self.cursor.epoch > 0:
            # The longest first: what is begun last ends last, and everything waits for it.
            lengths = self.ledger.last_lengths(fresh)
            begun = sorted(fresh, key=lambda g: -lengths.get(g.prompt.id, 0.0))
        fillings = {group.order: self._fill(group) for group in begun}
        for group in fresh:
            fillings[group.order].add_done_callback(self._finished.put_nowait)
            self._under_way[fillings[group.order]] = group

    def _fill(self, group: Group) -> asyncio.Future[None]:
        """Begin to sample G completions of the prompt and to score them, or take them from the checkpoint."""
        if (kept := self._carried.take(group)) is not None:
            self._counts.from_checkpoint += 1
            group.samples, group.scores = kept.infos(self.roles.samples.put(kept.samples)), kept.scores
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        prompt, seed = group.prompt, self.config.seed
        requests = [
            SampleRequest(prompt.id, i, prompt.token_ids, sample_seed(seed, prompt.id, i), self._params)
            for i in range(self.config.rollout.num_generations)
        ]
        return Filling(
            group,
            requests,
            self.roles.sampler,
            self.roles.scorer,
            at_once=self.config.reward.whole_groups,
            trainer=self._trainer_state(group.dispatched_version),
        )

    def _trainer_state(self, step: int) -> TrainerState:
        length = self._length
        return TrainerState.at(
            step,
            self.total_steps,
            prompts_per_step=length.size,
            num_prompts=len(self.cursor),
            num_trained=length.num_rows,
        )

    def _keep(self, group: Group) -> bool:
        """Apply the failure policy. A dropped group is replaced by the next prompt.

        Raises:
            RewardError: more scores failed than `reward.on_failure.abort_above` allows, or there are rewards of steps and no use
                for them.
        """
        policy = self.config.reward.on_failure
        self._refuse_steps(group)
        counts = self._counts
        counts.scored += len(group.scores)
        failed = [s for s in group.scores if s.status.failed]
        for score in failed:
            part = next((p for p in score.parts if p.status.failed), None)
            name = part.name if part else "reward"
            counts.failed[name] = counts.failed.get(name, 0) + 1
            counts.last_failure = f"{name}: {score.status}: {score.detail}"
        num_failed = sum(counts.failed.values())
        # Four groups at least: one poisoned prompt is no reason to end, and a function that always hangs is found soon.
        enough = min(self.config.prompts_per_step, 4) * self.config.rollout.num_generations
        if num_failed > policy.abort_above * max(counts.scored, enough):
            raise RewardError(
                f"{num_failed} of {counts.scored} scores of step {self.step + 1} failed, more than reward.on_failure.abort_above "
                f"({policy.abort_above:g}) allows; the last one: {counts.last_failure}"
            )
        if not failed:
            return True
        if policy.action == "value":
            group.scores = [
                Score(status=s.status, value=policy.value, parts=s.parts, detail=s.detail) if s.status.failed else s
                for s in group.scores
            ]
            return True
        self.ledger.dropped(group, self.step + 1, f"reward_{failed[0].status}")
        counts.dropped["reward_failed"] = counts.dropped.get("reward_failed", 0) + 1
        return False

    def _refuse_steps(self, group: Group) -> None:
        """Their sum would be trained on in silence, and a run of that is not what anybody wrote steps for."""
        kind = self.config.algorithm.advantage
        name = next((p.name for s in group.scores for p in s.parts if p.steps), None)
        if name is not None and kind != "process":
            raise RewardError(
                f"reward {name!r} gives rewards of steps, and algorithm.advantage {kind} compares rewards of whole samples; use "
                "algorithm.advantage process, or return the sum"
            )

    def _has_signal(self, group: Group) -> bool:
        """Dynamic sampling: a group whose rewards are all equal moves nothing, and the next prompt takes its place."""
        if not self.config.algorithm.dynamic_sampling or has_spread(group):
            return True
        self.ledger.dropped(group, self.step + 1, NO_SIGNAL)
        self._tally.add(group)
        self._counts.dropped[NO_SIGNAL] = self._counts.dropped.get(NO_SIGNAL, 0) + 1
        return False

    async def _update(self, groups: list[Group], batch: TrainBatch) -> UpdateReport:
        """Raises NonFiniteError when the batch that caused it is on disk."""
        await self._early.finish()
        try:
            return await self.roles.learner.update(batch)
        except NonFiniteError as e:
            step = batch.step + 1
            await self.roles.rollout_log.write(step, groups, batch)
            await self.roles.rollout_log.close()
            # What it says depends on the checkpoint that may just be written.
            await self._saver.close()
            how = how_to_replay(self.run_dir, step, recorded=self.config.tracking.rollouts)
            raise NonFiniteError(f"{e}. {how}") from None

    # What is written down.

    def _record(
        self, groups: list[Group], update: UpdateReport, sync: SyncReport, untrained: Mapping[str, str]
    ) -> None:
        metrics = step_metrics(
            groups,
            update,
            sync,
            sampler_stats=self.roles.sampler.take_stats(),
            seconds=self._time.end_step(),
            dropped=self._counts.dropped,
            failed=self._counts.failed,
            untrained=untrained,
            ahead=self.config.algorithm.max_staleness > 0 or self._counts.from_checkpoint > 0,
        )
        metrics |= self._busy_metrics(metrics, [*update.tracks, *sync.tracks]) | self._saver.take_metrics()
        self._warn_of_mismatch(metrics.get("mismatch/mean_abs"))
        for group in groups:
            self._tally.add(group)
        notices = self._health.after_step(self.step, self._tally, len(groups), untrained, update.metrics)
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
        """What everyone did since the last call; the learners' come with their reports."""
        return {
            "controller": [self._activity.take()],
            "rollout": self.roles.sampler.take_tracks(),
            "reward": self.roles.scorer.take_tracks(),
            "votes": self.roles.voter.take_tracks() if self.roles.voter else [],
        }

    def _tell_all(self, messages: Sequence[MessageEvent]) -> None:
        for message in messages:
            self.emit(message)

    def _advise(self) -> None:
        if self._health.problem is not None:
            # What makes a run faster is no help to one that does not learn.
            self.emit(MessageEvent("warning", self._health.problem))
            return
        times = mean_step(list(self._lines), self.config.model_dump())
        advice = advise(times) if times else None
        if advice is not None:
            self.emit(MessageEvent("info", advice.text))

    def _warn_of_mismatch(self, mean_abs: float | None) -> None:
        """Once each time that the bound is crossed, not at every step above it. None: no token of the step tells."""
        if mean_abs is None:
            return
        warning = mismatch_warning(mean_abs, self.config)
        if warning is not None and not self._disagreed:
            self.emit(MessageEvent("warning", warning))
        self._disagreed = warning is not None

    def _track(self, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.step, metrics)

    async def _evaluate(self) -> None:
        """Every evaluation set in turn."""
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
                    trainer=self._trainer_state(self.step),
                )
            metrics |= eval_metrics(result, name) | {"time/eval": metrics["time/eval"] + span.seconds}
            self.emit(eval_event(self.step, name, result))
            self._tell_all(self._health.after_eval(self.step, name, result))
        self._evaluated_step = self.step
        if self.eval_prompts:
            self._track(metrics)

    def _tell(self, phase: str, detail: str, done: int, total: int) -> None:
        self.emit(PhaseEvent(phase, detail, done, total))

    async def _checkpoint(self, *, export: bool) -> None:
        """What is under way begins again with the resumed run; what is finished is kept."""
        self._checkpoint_wanted = False
        order = min(self._cursor_at, default=self._order)
        state: dict[str, Any] = {
            "step": self.step,
            "order": order,
            "cursor": self._cursor_at.get(order, self.cursor.state_dict()),
            "dropped": [asdict(row) for row in self.ledger.dropped_from(order)],
            "sampling": self._sampling,
            "health": self._health.state_dict(),
        }
        finished = sorted((*self._ready, *(g for t, g in self._under_way.items() if _succeeded(t))), key=_order)

        async def fetch() -> Callable[[Path], None]:
            lists = await self.roles.samples.fetch(distinct_refs(finished))
            return lambda folder: write_groups(folder / Path(KEPT_GROUPS).name, finished, lists)

        with self._time.phase("checkpoint") as span:
            await self._saver.save(self.step, state, export=export, more=fetch)
        self._saved_step = self.step
        if self.step > 0:
            self._track({"time/checkpoint": span.seconds})


def _order(group: Group) -> int:
    return group.order


def _succeeded(filling: asyncio.Future[None]) -> bool:
    return filling.done() and not filling.cancelled() and filling.exception() is None
