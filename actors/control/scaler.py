"""Changes the number of a run's workers during the run: on the command `grpo-ray scale`, or by itself, within the config's bounds.

    scale -> [the config allows it] -> [the cluster has room] -> rollout engines and reward workers: at once
                                                              -> learner ranks: when the loop is between two steps

The last request is in the run's config.yaml, with which a resumed run begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from actors.cluster import await_resources, demands, has_gpus
from grpo_ray.config.scaling import (
    PATIENCE,
    SCALED,
    SELF_SCALED,
    Counts,
    Load,
    bounds,
    change,
    counts,
    decide,
    load_of,
    parse_counts,
    rescaled,
)
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DeadlineError, GrpoRayError, ResourceError, WorkerError
from grpo_ray.loop.roles import Learner, WeightSync
from grpo_ray.run.checkpoint_store import CheckpointLocation


class WorkerGroup(Protocol):
    """The workers of a run."""

    @property
    def num_learners(self) -> int:
        """The number of learner ranks that run now."""
        ...

    def take_most_waiting(self) -> Counts:
        """Role -> the most samples that waited for a worker at once since the last call."""
        ...

    def reconfigure(self, config: RunConfig) -> None:
        """Scale rollout engines and reward workers to the config's numbers; learners that start from now on follow it too."""
        ...

    async def change_learner(self, place: CheckpointLocation | None) -> tuple[Learner, WeightSync]:
        """See `roles.Scaler.change_learners`."""
        ...


class RunScaler:
    """`roles.Scaler`. All methods belong to the event loop of the controller."""

    def __init__(
        self, config: RunConfig, crew: WorkerGroup, record: Callable[[Counts], None], tell: Callable[[str, str], None]
    ) -> None:
        """
        Args:
            record: records the numbers for a resumed run.
            tell: reports a level and a text to those who follow the run.
        """
        self._config = config
        self._crew = crew
        self._record = record
        self._tell = tell
        self._lock = asyncio.Lock()
        self._loads: dict[str, list[Load]] = {role: [] for role in SELF_SCALED}
        self._no_room: set[str] = set()
        """The roles that the cluster had no room for."""
        self._scaling_itself: asyncio.Task[None] | None = None
        self._waiting: asyncio.Task[None] | None = None
        """The task that waits for room on the cluster."""
        self._closed = False

    async def close(self) -> None:
        """End the scaler with the run. Nothing waits for room any more: the autoscaler would keep nodes for it."""
        self._closed = True
        if self._waiting is not None:
            self._waiting.cancel()
            await asyncio.gather(self._waiting, return_exceptions=True)

    async def scale(self, words: Sequence[str]) -> str:
        """Run the command, e.g. `["rollout=4", "learner=2"]`. Returns the old and the new numbers.

        Raises:
            ConfigError: words without numbers, or numbers that this run can't have.
            ResourceError: the cluster did not get large enough within deadlines.resources_s, or the run ended before.
        """
        asked = parse_counts(words)
        async with self._lock:
            before = counts(self._config)
            await self._change(asked)
            self._no_room.clear()
        told = change(before, asked)
        self._tell("info", f"scaled: {told}")
        changed = [role for role in SCALED if role in asked and asked[role] != before[role]]
        return told + "".join(f"; {_WHEN[role]}" for role in changed)

    async def _change(self, asked: Mapping[str, int]) -> None:
        config = rescaled(self._config, asked)
        before = counts(self._config)
        if any(number > before[role] for role, number in asked.items()):
            await self._await_room(config)
        self._use(config)

    async def _await_room(self, config: RunConfig) -> None:
        room = await_resources(demands(config, has_gpus()), config.deadlines.resources_s)
        self._waiting = asyncio.create_task(room)
        try:
            await self._waiting
        except asyncio.CancelledError:
            if self._closed:
                raise ResourceError("the run has ended; the cluster had no room for more workers till then") from None
            raise

    def _use(self, config: RunConfig) -> None:
        self._config = config
        self._record(counts(config))
        self._crew.reconfigure(config)

    def after_step(self, _step: int, metrics: Mapping[str, float]) -> None:
        """Check whether a role with bounds has too few workers, or too many."""
        waiting, asked = self._crew.take_most_waiting(), counts(self._config)
        for role, loads in self._loads.items():
            low, high = bounds(self._config, role)
            load = load_of(role, metrics, waiting[role])
            if metrics.get(f"workers/{role}") != asked[role] or load is None:
                loads.clear()  # Some workers are about to join, or to leave.
                continue
            loads.append(load)
            del loads[:-PATIENCE]
            number = decide(asked[role], low, high, loads)
            if number == asked[role] or (number > asked[role] and role in self._no_room) or self._is_scaling_itself:
                continue
            loads.clear()
            waited = f"waited for {load.wait_fraction:.0%} of it"
            why = f"busy {load.busy:.0%} of the step, {waited}, {load.waiting} samples in the queue"
            self._scaling_itself = asyncio.create_task(self._scale_itself(role, number, why))

    @property
    def _is_scaling_itself(self) -> bool:
        return self._scaling_itself is not None and not self._scaling_itself.done()

    async def _scale_itself(self, role: str, number: int, why: str) -> None:
        async with self._lock:
            told = change(counts(self._config), {role: number})
            try:
                await self._change({role: number})
            except GrpoRayError as e:
                self._no_room.add(role)
                self._tell("warning", f"the run would scale itself, {told} ({why}), and can't: {e}")
            else:
                self._tell("info", f"the run scaled itself: {told} ({why})")

    @property
    def wants_learners(self) -> bool:
        return self._config.learner.num_actors != self._crew.num_learners

    async def change_learners(self, place: CheckpointLocation | None) -> tuple[Learner, WeightSync]:
        before = self._crew.num_learners
        try:
            return await self._crew.change_learner(place)
        except (WorkerError, DeadlineError) as e:
            wanted = self._config.learner.num_actors
            self._tell("error", f"{wanted} learners do not start, it stays at {before}: {e}")
            self._use(rescaled(self._config, {"learner": before}))
            return await self._crew.change_learner(place)


_WHEN = {
    "rollout": "samplers join with the next weights and leave when they have finished what they sample",
    "reward": "reward workers join and leave at once",
    "environment": "environment workers join and leave at once; episodes of those that leave are drawn again",
    "learner": "learners change after the step under way",
}
