"""Group collection: groups are dispatched in data order and batched in that order, however they finish.

    cursor -> dispatch -> GroupRollout (sample x G -> score) -> finished -> failure policy -> signal? -> ready -> oldest P
                 ^                                                               |              |
                 +---- the next prompt replaces a group that is left out --------+--------------+

`max_staleness` k paces dispatch: at most (k + 1) x P groups are in flight beyond what is trained.
"""

from __future__ import annotations

import asyncio
import bisect
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.epochs import RunLength, used_up
from grpo_ray.errors import PoisonedError, RewardError
from grpo_ray.health.watch import Health
from grpo_ray.loop.failure_policy import StepCounts, apply_failure_policy, refuse_rewards_of_steps
from grpo_ray.loop.group_rollout import GroupRollout
from grpo_ray.loop.overlap import PartialBatches
from grpo_ray.loop.requests import requests_of
from grpo_ray.loop.roles import Learner, Roles
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.kept_groups import KEPT_GROUPS, KeptGroup, read_groups, write_groups
from grpo_ray.run.ledger import Ledger, LedgerRow
from grpo_ray.run.restored_groups import RestoredGroups, how_sampled
from grpo_ray.run.rollout_log import distinct_refs
from grpo_ray.run.saver import More
from grpo_ray.spread import has_spread
from grpo_ray.telemetry.events import Event, MessageEvent, PhaseEvent
from grpo_ray.types import Group, Prompt, TrainerState

NO_SIGNAL = "no_signal"
"""The reason recorded for a group that dynamic sampling drops."""
POISONED = "poisoned"
"""The reason recorded for a group whose prompt crashes rollout engines."""
LAST_BATCH = "last_batch"
"""The reason recorded for a group left over at the end of the run, where `data.last_batch` is `drop`."""


class Collector:
    """Collector of the groups of one run, from dispatch until they are in a batch."""

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        cursor: Cursor[Prompt],
        length: RunLength,
        ledger: Ledger,
        health: Health,
        emit: Callable[[Event], None],
    ) -> None:
        self.config = config
        self.emit = emit
        self._roles = roles
        self._cursor = cursor
        self._length = length
        self._ledger = ledger
        self._health = health
        self._step = 0
        """The number of steps done, which is also the policy version that new groups start with."""
        self._total_steps = length.num_steps
        self._order = 0
        """The dispatch order of the next group."""
        self._under_way: dict[asyncio.Future[None], Group] = {}
        """The groups in flight, in dispatch order."""
        self._finished: asyncio.Queue[asyncio.Future[None]] = asyncio.Queue()
        """Futures that are done and not settled: groups, and partial batches that the learner has finished."""
        self.early = PartialBatches(config, roles.learner, self._finished.put_nowait)
        self._ready: list[Group] = []
        """Complete groups that are in no batch yet, in dispatch order."""
        self._cursor_at: dict[int, dict[str, Any]] = {}
        """The order of each group in flight or ready, ascending -> the cursor just before it, where a resumed run starts again."""
        self._carried = RestoredGroups()
        self.counts = StepCounts()
        self.tally = health.tally()
        """The tally of the step in progress; while groups are collected, of those that dynamic sampling drops."""
        self._params = config.rollout.sampling_params
        self._sampling = how_sampled(config, self._params)

    # One step

    async def collect(self, step: int, total_steps: int) -> list[Group]:
        """Return the next P complete groups in dispatch order, while the learner works on those that are already complete.

        There are fewer than P, but at least one, when the budget of dynamic sampling or the prompts are used up, and none when no
        batch is left. Groups are always the oldest: however samples overtake each other, batches are the same, and no group waits
        for more than `max_staleness` steps.

        Args:
            step: the number of steps done.
            total_steps: the number of steps of the run, as far as is known.
        """
        self._step, self._total_steps = step, total_steps
        self.counts, self.tally = StepCounts(), self._health.tally()
        while True:
            available = self._length.next_batch(self.num_left(), len(self._ready) + len(self._under_way))
            if not available:
                return []
            wanted = min(self._wanted(), available)
            self._dispatch(wanted)
            if self._num_oldest_ready() >= wanted:
                break
            if self.early.wants_more:
                self.early.offer(self._certain(wanted), self._step + 1)
            finished = await self._finished.get()
            if finished in self._under_way:
                self._settle(self._under_way.pop(finished), finished)
            self.emit(PhaseEvent("rollout", "", min(len(self._ready), wanted), wanted))
        if not wanted:
            raise RewardError(
                f"step {self._step + 1}: none of {self.counts.dropped[NO_SIGNAL]} groups has two different rewards, which "
                f"algorithm.dynamic_sampling asks for: {self._health.why_all_dropped(self._step + 1, self.tally)}"
            )
        batch, self._ready = self._ready[:wanted], self._ready[wanted:]
        for group in batch:
            del self._cursor_at[group.order]
        return batch

    def num_left(self) -> float:
        """The number of prompts that may still be dispatched."""
        return self._length.num_left(self._order, self._carried.dropped)

    def _num_oldest_ready(self) -> int:
        """The number of groups at the head of `_ready` that were dispatched before everything in flight."""
        oldest = next((g.order for g in self._under_way.values()), self._order)
        return bisect.bisect_left(self._ready, oldest, key=_order)

    def _certain(self, wanted: int) -> list[Group]:
        """The complete groups that are certain to be in this step's batch: fewer than `wanted` can come before them."""
        *_, last = islice(self._cursor_at, wanted)
        return self._ready[: bisect.bisect_right(self._ready, last, key=_order)]

    def _wanted(self) -> int:
        """The number of groups in this step's batch.

        Each group without signal beyond the budget of dynamic sampling makes the batch one smaller instead of being replaced; which
        groups are in it never depends on the order in which they finished.
        """
        a, size = self.config.algorithm, self.config.prompts_per_step
        if not a.dynamic_sampling:
            return size
        unreplaced = self.counts.dropped.get(NO_SIGNAL, 0) - (a.max_sampling_rounds - 1) * size
        # Sampling ahead may have spent the budget while groups for later steps are complete: those are not lost.
        return max(size - max(0, unreplaced), min(size, self._num_oldest_ready()), self._num_due())

    def _num_due(self) -> int:
        """The number of groups that have to be in this step's batch for none to exceed its staleness bound: one that is due j steps
        later needs all groups before it trained by then as well, and a step trains at most P.
        """
        bound, size = self.config.algorithm.max_staleness, self.config.prompts_per_step
        groups = sorted((*self._ready, *self._under_way.values()), key=_order)
        last_steps = (max(g.dispatched_version + bound - self._step, 0) for g in groups)
        return max((place + 1 - j * size for place, j in enumerate(last_steps)), default=0)

    # Dispatch

    def _dispatch(self, wanted: int) -> None:
        """Start as many groups as the staleness bound allows, without those that a later step would train too late or no step
        would train."""
        ahead = min(self.config.algorithm.max_staleness, self._total_steps - self._step - 1)
        allowed = wanted + ahead * self.config.prompts_per_step
        num_fresh = min(allowed - len(self._ready) - len(self._under_way), self.num_left())
        fresh = [self._next_group() for _ in range(int(num_fresh))]
        if not fresh:
            return
        self._ledger.dispatched(fresh)
        begun = fresh
        if self._cursor.epoch > 0:
            # The longest first: what starts last ends last, and the step waits for it.
            lengths = self._ledger.last_lengths(fresh)
            begun = sorted(fresh, key=lambda g: -lengths.get(g.prompt.id, 0.0))
        fillings = {group.order: self._fill(group) for group in begun}
        for group in fresh:
            fillings[group.order].add_done_callback(self._finished.put_nowait)
            self._under_way[fillings[group.order]] = group

    def _next_group(self) -> Group:
        while self._order in self._carried.dropped:
            self._cursor.next()
            self._order += 1
        self._cursor_at[self._order] = self._cursor.state_dict()
        kept = self._carried.groups.get(self._order)
        version = kept.dispatched_version if kept else self._step
        group = Group(prompt=self._cursor.next(), order=self._order, dispatched_version=version)
        self._order += 1
        return group

    def _fill(self, group: Group) -> asyncio.Future[None]:
        """Start sampling and scoring G completions of the prompt, or take them from the checkpoint."""
        if (kept := self._carried.take(group)) is not None:
            self.counts.from_checkpoint += 1
            group.samples, group.scores = kept.infos(self._roles.samples.put(kept.samples)), kept.scores
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        trainer = self.trainer_state(group.dispatched_version, self._total_steps)
        indices = range(self.config.rollout.num_generations)
        requests = requests_of(group.prompt, indices, self.config, self._params, group.dispatched_version, trainer)
        return GroupRollout(
            group,
            requests,
            self._roles.sampler,
            self._roles.scorer,
            at_once=self.config.reward.whole_groups,
            trainer=trainer,
        )

    def trainer_state(self, step: int, total_steps: int) -> TrainerState:
        return TrainerState.at(
            step,
            total_steps,
            prompts_per_step=self._length.size,
            num_prompts=len(self._cursor),
            num_trained=self._length.num_rows,
        )

    # Finished groups

    def _settle(self, group: Group, filling: asyncio.Future[None]) -> None:
        try:
            filling.result()
        except PoisonedError as e:
            self._leave_out(group)
            self._ledger.dropped(group, self._step + 1, POISONED)
            self.counts.drop(POISONED)
            instead = ", and the next prompt takes its place" if self.num_left() else ""
            self.emit(MessageEvent("error", f"{e}. It is set aside{instead}"))
            return
        self._ledger.sampled(group)
        if (reason := self._why_not(group)) is None:
            bisect.insort(self._ready, group, key=_order)
            self.early.came(group)
        else:
            self._ledger.dropped(group, self._step + 1, reason)
            self._leave_out(group)

    def _why_not(self, group: Group) -> str | None:
        """The reason why a group is left out of the batch and replaced by the next prompt; None if it is kept."""
        refuse_rewards_of_steps(group, self.config.algorithm)
        if (failure := apply_failure_policy(group, self.counts, self.config, self._step + 1)) is not None:
            return failure
        if not self.config.algorithm.dynamic_sampling or has_spread(group):
            return None
        self.tally.add(group)
        self.counts.drop(NO_SIGNAL)
        return NO_SIGNAL

    def _leave_out(self, group: Group) -> None:
        """Remove the group from every batch, so that others take its place."""
        del self._cursor_at[group.order]
        self.early.look_again()

    # End of the run, and its checkpoints

    async def end(self) -> str:
        """Drop the remaining groups, since the prompts are used up before the steps are: they make no batch.

        Returns:
            The message for the user.
        """
        await self.early.finish()
        for group in (*self._ready, *self._under_way.values()):
            self._leave_out(group)
            self._ledger.dropped(group, self._step + 1, LAST_BATCH)
        for filling in self._under_way:
            filling.cancel()
        self._ready, self._under_way = [], {}
        return used_up(self.config, self._step, self._total_steps, self._ledger.summary().drop_reasons)

    async def cancel(self) -> None:
        """Cancel all groups in flight and the partial batch."""
        for filling in self._under_way:
            filling.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        await self.early.cancel()

    def follow(self, learner: Learner) -> None:
        """Send finished groups to this learner from now on."""
        self.early = PartialBatches(self.config, learner, self._finished.put_nowait)

    def state_dict(self) -> dict[str, Any]:
        """Where a resumed run starts again: groups in flight are sampled anew."""
        order = min(self._cursor_at, default=self._order)
        return {
            "order": order,
            "cursor": self._cursor_at.get(order, self._cursor.state_dict()),
            "dropped": [asdict(row) for row in self._ledger.dropped_from(order)],
            "sampling": self._sampling,
        }

    def finished_groups(self) -> More:
        """A writer of the groups that are finished now and in no batch, for a checkpoint."""
        finished = sorted((*self._ready, *(g for t, g in self._under_way.items() if _succeeded(t))), key=_order)

        async def fetch() -> Callable[[Path], None]:
            lists = await self._roles.samples.fetch(distinct_refs(finished))
            return lambda folder: write_groups(folder / Path(KEPT_GROUPS).name, finished, lists)

        return fetch

    async def load_state_dict(self, state: dict[str, Any], step: int, place: CheckpointLocation) -> None:
        """Restore the state of a checkpoint, with its finished groups.

        Args:
            state: the result of `state_dict`.
            step: the step of the checkpoint.
            place: the location of the checkpoint, with its finished groups.
        """
        self._step = step
        self._cursor.load_state_dict(state["cursor"])
        self._order = state["order"]
        forgotten = self._ledger.roll_back(step, self._order)
        dropped = [LedgerRow(**row) for row in state["dropped"]]
        self._ledger.put_back(dropped)
        kept = await asyncio.to_thread(_read_kept, place) if state["sampling"] == self._sampling else []
        self._carried, too_old = RestoredGroups.of(kept, dropped, self._order, step, self.config)
        num_kept = len(self._carried.groups)
        again = forgotten - len(dropped) - num_kept
        if num_kept or again > 0:
            self.emit(
                MessageEvent(
                    "info",
                    f"{num_kept} finished groups are taken from the checkpoint; {max(again, 0)} groups after "
                    f"step {step} will be sampled again"
                    + (f", {too_old} since they are too old now" if too_old else ""),
                )
            )


def _read_kept(place: CheckpointLocation) -> Sequence[KeptGroup]:
    with place.reading() as files:
        return read_groups(files.local(KEPT_GROUPS))


def _order(group: Group) -> int:
    return group.order


def _succeeded(filling: asyncio.Future[None]) -> bool:
    return filling.done() and not filling.cancelled() and filling.exception() is None
