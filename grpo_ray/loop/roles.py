"""What the loop needs of the machinery, and nothing more.

`actors/` implements these over Ray; a test implements them over plain objects. What takes time is awaited: the loop has thousands
of samples under way at once and reads as if it had one.

Contract of every method: it ends, with a result or an exception, within the deadline that its owner was built with; the
exception names what was waited for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.manifest import FileSum
from grpo_ray.types import (
    Group,
    Sample,
    SampleInfo,
    SampleRequest,
    Score,
    ScoreRequest,
    SyncReport,
    Track,
    TrainBatch,
    UpdateReport,
)


class Sampler(Protocol):
    """A pool of rollout engines. Chooses the engine, moves work when one dies."""

    def generate(self, request: SampleRequest) -> Awaitable[SampleInfo]:
        """Draw one sample. Many calls run at once, and whoever cancels one needs it no more."""
        ...

    def take_stats(self) -> dict[str, float]:
        """Figures since the last call, e.g. tokens and busy seconds per engine."""
        ...

    def take_tracks(self) -> list[Track]:
        """What each engine did since the last call."""
        ...


class Scorer(Protocol):
    """A pool of reward workers."""

    def score(self, requests: Sequence[ScoreRequest]) -> Awaitable[list[Score]]:
        """Score samples (one, or a whole group for rewards that compare its members); one Score each, in order.

        A failing reward function is a `Score` with that status. An exception means that the pool itself is broken.
        """
        ...

    def take_tracks(self) -> list[Track]:
        """What each worker did since the last call."""
        ...


class Learner(Protocol):
    """All learner ranks as one."""

    async def accumulate(self, part: TrainBatch) -> None:
        """Forward and backward of groups that will be in the batch of the next `update`, while it is not whole yet."""
        ...

    async def update(self, batch: TrainBatch) -> UpdateReport:
        """Train on the batch: `num_iterations` passes in mini-batches, one optimizer step for each mini-batch. What
        `accumulate` has had of it is not computed again."""
        ...

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        """Copy into memory what `write` will write: weights, optimizer, schedule, random state; with `export` also the policy as a
        Hugging Face model."""
        ...

    async def write(self, place: CheckpointLocation) -> Mapping[str, FileSum]:
        """Write what is held into a new place, while training goes on; returns what was written. Called once after `hold`."""
        ...

    async def load(self, place: CheckpointLocation) -> None:
        """Back to what was held."""
        ...


class WeightSync(Protocol):
    """The way from the learner to the samplers."""

    async def sync(self, version: int) -> SyncReport:
        """Give every live engine the learner's current weights under the name `version`; all of them, or an error."""
        ...


class Scaler(Protocol):
    """Who changes the number of workers while a run goes on. Samplers and scorers come and go by themselves; for learners the loop
    has to be between two steps."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done; its metrics may be a reason to scale."""
        ...

    @property
    def wants_learners(self) -> bool:
        """The number of learners is to change."""
        ...

    async def change_learners(self, place: CheckpointLocation | None) -> tuple[Learner, WeightSync]:
        """End the learners and start others, with what is saved at `place`; None: with the starting model. Samplers, which have
        the same weights, go on meanwhile."""
        ...


class SampleStore(Protocol):
    """Where the tokens are, behind `SampleInfo.ref`."""

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        """The lists behind these handles, in order."""
        ...

    def put(self, samples: list[Sample]) -> Any:
        """A handle on these."""
        ...


class InMemory:
    """`SampleStore` whose handles are the lists themselves."""

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        return refs

    def put(self, samples: list[Sample]) -> Any:
        return samples


class RolloutLog(Protocol):
    """Where samples are written down for people: `rollouts/*.parquet`."""

    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        """May return before the file is there; the next call, or `close`, says what went wrong with it.

        `batch`: what the learner gets of these groups.
        """
        ...

    async def close(self) -> None:
        """Everything is on disk when it returns; a later `write` opens it again."""
        ...


@dataclass(frozen=True)
class Roles:
    """Who does what in one run."""

    sampler: Sampler
    scorer: Scorer
    learner: Learner
    weights: WeightSync
    rollout_log: RolloutLog
    samples: SampleStore = field(default_factory=InMemory, kw_only=True)
    voter: Scorer | None = None
    """Tells which answers of an evaluation are the same; see `grpo_ray.loop.evaluate.vote_config`."""
    shared_devices: bool = False
    """Samplers and learners use the same ones: what one wins by working at the same time, the other loses."""
    scaler: Scaler | None = field(default=None, kw_only=True)
