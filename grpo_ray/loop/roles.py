"""Protocols of everything that the loop calls: rollout engines, reward workers, learner, weight sync, scaling, samples and logs.

`actors/` implements these over Ray; a test implements them over plain objects. Slow calls are awaited: the loop has
thousands of samples in flight and reads as if it had one.

Every method ends, with a result or an exception, within the deadline that its owner was built with; the exception names what was
waited for.
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
    """Pool of rollout engines, which chooses the engine and moves requests when one dies."""

    def generate(self, request: SampleRequest) -> Awaitable[SampleInfo]:
        """Sample one completion. Many calls run at once; a cancelled call's sample is not needed any more."""
        ...

    def take_stats(self) -> dict[str, float]:
        """Figures since the last call, e.g. tokens and busy seconds per engine."""
        ...

    def take_tracks(self) -> list[Track]:
        """What each engine did since the last call."""
        ...


class Scorer(Protocol):
    """Pool of reward workers."""

    def score(self, requests: Sequence[ScoreRequest]) -> Awaitable[list[Score]]:
        """Score samples (one, or a whole group for rewards that compare its members); one Score each, in order.

        A failing reward function is a `Score` with that status. An exception means that the pool itself is broken.
        """
        ...

    def take_tracks(self) -> list[Track]:
        """What each reward worker did since the last call."""
        ...


class Learner(Protocol):
    """All learner ranks as one."""

    async def accumulate(self, part: TrainBatch) -> None:
        """Run forward and backward passes on groups that will be in the batch of the next `update`, while it is not complete
        yet."""
        ...

    async def update(self, batch: TrainBatch) -> UpdateReport:
        """Train on the batch: `num_iterations` passes in mini-batches, one optimizer step for each mini-batch. Groups that
        `accumulate` has had are not computed again.
        """
        ...

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        """Copy into memory what `write` will write: weights, optimizer, schedule, random state; with `export` also the policy as a
        Hugging Face model.
        """
        ...

    async def write(self, place: CheckpointLocation) -> Mapping[str, FileSum]:
        """Write the held copy into a new place while training goes on; returns what was written. Called once after `hold`."""
        ...

    async def load(self, place: CheckpointLocation) -> None:
        """Restore the state saved at `place`."""
        ...


class WeightSync(Protocol):
    """Weight synchronization from learner ranks to rollout engines."""

    async def sync(self, version: int) -> SyncReport:
        """Give every live engine the learner's current weights as policy `version`; all of them, or raise."""
        ...


class Scaler(Protocol):
    """Autoscaler of the workers of a running run. Rollout engines and reward workers are added and removed without the loop;
    learner ranks only between two steps.
    """

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note that a step is done; its metrics may be a reason to scale."""
        ...

    @property
    def wants_learners(self) -> bool:
        """Whether the number of learner ranks is to change."""
        ...

    async def change_learners(self, place: CheckpointLocation | None) -> tuple[Learner, WeightSync]:
        """Replace the learner ranks by others that load the checkpoint at `place`; None: the starting model. Rollout engines, which
        have the same weights, keep sampling meanwhile.
        """
        ...


class SampleStore(Protocol):
    """Store of the tokens behind `SampleInfo.ref`."""

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        """The lists behind these handles, in order."""
        ...

    def put(self, samples: list[Sample]) -> Any:
        """A handle on these samples."""
        ...


class InMemory:
    """`SampleStore` whose handles are the lists themselves."""

    async def fetch(self, refs: list[Any]) -> list[Sequence[Sample]]:
        return refs

    def put(self, samples: list[Sample]) -> Any:
        return samples


class RolloutLog(Protocol):
    """Human-readable log of samples: `rollouts/*.parquet`."""

    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        """Queue the groups of a step; the file may be written after the return, and the next call, or `close`, raises its error.

        `batch` is what the learner gets of these groups.
        """
        ...

    async def close(self) -> None:
        """Flush everything to disk before returning; a later `write` opens the log again."""
        ...


@dataclass(frozen=True)
class Roles:
    """The implementations of all Protocols for one run."""

    sampler: Sampler
    scorer: Scorer
    learner: Learner
    weights: WeightSync
    rollout_log: RolloutLog
    samples: SampleStore = field(default_factory=InMemory, kw_only=True)
    voter: Scorer | None = None
    """Decides which answers of an evaluation are the same; see `grpo_ray.loop.evaluate.vote_config`."""
    shared_devices: bool = False
    """Whether rollout engines and learner ranks share devices: what one gains by working at the same time, the other loses."""
    scaler: Scaler | None = field(default=None, kw_only=True)
