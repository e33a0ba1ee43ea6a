"""Changes the number of a run's workers while it goes on: by the command `grpo-ray scale`.

    scale -> [the config allows it] -> [the cluster has room] -> samplers and reward workers: at once
                                                              -> learners: when the loop is between two steps

What was asked for last is in the run's config.yaml, with which a resumed run begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from actors.cluster import await_resources, demands, has_gpus
from grpo_ray.checkpoint_store import Place
from grpo_ray.config import RunConfig
from grpo_ray.errors import DeadlineError, WorkerError
from grpo_ray.roles import Learner, WeightSync
from grpo_ray.scaling import SCALED, Counts, change, counts, parse_counts, rescaled


class Crew(Protocol):
    """The workers of a run."""

    @property
    def num_learners(self) -> int:
        """That there are."""
        ...

    def reconfigure(self, config: RunConfig) -> None:
        """Samplers and reward workers become as many as it says; learners that are started from now on, too."""
        ...

    async def change_learner(self, place: Place | None) -> tuple[Learner, WeightSync]:
        """See `roles.Scaler.change_learners`."""
        ...


class RunScaler:
    """`roles.Scaler`. All methods belong to the event loop of the controller."""

    def __init__(
        self, config: RunConfig, crew: Crew, record: Callable[[Counts], None], tell: Callable[[str, str], None]
    ) -> None:
        """
        Args:
            record: keeps the numbers for a resumed run.
            tell: level and text, for those who watch the run.
        """
        self._config = config
        self._crew = crew
        self._record = record
        self._tell = tell
        self._lock = asyncio.Lock()

    async def scale(self, words: Sequence[str]) -> str:
        """The command: `["rollout=4", "learner=2"]`. Returns what was and what will be.

        Raises:
            ConfigError: words that say no numbers, or numbers that this run can't have.
            ResourceError: the cluster did not get large enough within deadlines.resources_s.
        """
        asked = parse_counts(words)
        async with self._lock:
            before = counts(self._config)
            await self._change(asked)
        told = change(before, asked)
        self._tell("info", f"scaled: {told}")
        return told + "".join(f"; {_WHEN[role]}" for role in SCALED if asked.get(role, before[role]) != before[role])

    async def _change(self, asked: Mapping[str, int]) -> None:
        config = rescaled(self._config, asked)
        before = counts(self._config)
        if any(number > before[role] for role, number in asked.items()):
            await await_resources(demands(config, has_gpus()), config.deadlines.resources_s)
        self._use(config)

    def _use(self, config: RunConfig) -> None:
        self._config = config
        self._record(counts(config))
        self._crew.reconfigure(config)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    @property
    def wants_learners(self) -> bool:
        return self._config.learner.num_actors != self._crew.num_learners

    async def change_learners(self, place: Place | None) -> tuple[Learner, WeightSync]:
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
    "learner": "learners change after the step under way",
}
