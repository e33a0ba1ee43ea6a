"""What the two sides of a weight sync are to each other: engines to send to, ranks that send. No vLLM here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

from grpo_ray.errors import WorkerError
from grpo_ray.types import Track


@dataclass(frozen=True)
class EngineTarget:
    """One live rollout engine, as a weight sync sees it."""

    name: str
    """`rollout-0`."""
    incarnation: int
    """Counts the lives of this name: a restarted engine is another target."""
    handle: Any
    """Ray handle of its RolloutActor."""
    world_size: int
    """vLLM workers behind it (tensor parallelism): its ranks in the transfer group."""


class SendReport(TypedDict):
    """What rank 0 says of one transfer; the other ranks return the same with 0 bytes."""

    seconds: float
    bytes: int
    checksum: str
    tracks: NotRequired[list[Track]]
    """What the rank did since its last report; of all ranks, once the group has gathered them."""


class EnginePool(Protocol):
    """All rollout engines as a weight sync sees them; `actors.rollout.pool.RolloutPool` is one."""

    membership: asyncio.Lock
    """Held while engines join or leave, and while weights are on their way."""
    on_stale: Callable[[], Awaitable[None]] | None
    """Called when samples wait for engines that have older weights."""
    on_trouble: Callable[[str], None]

    @property
    def version(self) -> int:
        """The version of the weights that the engines hold."""
        ...

    @property
    def stages_weights(self) -> bool:
        """Engines take weights beside sampling, and only pause to swap them in."""
        ...

    @property
    def num_unfinished(self) -> int:
        """Samples that are asked for and not there."""
        ...

    def engines(self, *, stale_only: bool = False) -> list[EngineTarget]:
        """Those that live; `stale_only`: and hold other weights than `version`."""
        ...

    async def wait_for_engines(self) -> list[EngineTarget]:
        """Those that live, at least one."""
        ...

    def mark_paused(self, targets: Sequence[EngineTarget], *, paused: bool) -> None: ...

    def mark_synced(self, targets: Sequence[EngineTarget], version: int) -> None: ...

    def engine_failed(self, target: EngineTarget, reason: str, *, blame_work: bool) -> None:
        """It is ended and restarted. `blame_work`: what it worked on may be the cause."""
        ...


class LearnerWeights(Protocol):
    """The learner group's side of a sync. Each method calls all ranks at once, in the same order, and gathers."""

    unsent: bool
    """An update was handed to the ranks since they last sent: what they would send now is not what the engines hold."""

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        """`weights_connect(list(targets), generation)` on every rank. Errors of a rank are raised as they are."""
        ...

    async def send_weights(self, version: int) -> SendReport:
        """`weights_send(version)` on every rank; the answer of rank 0.

        Must hand its calls to the ranks before it first awaits: the order of this call and of `update` is what makes the
        label `version` true.
        """
        ...


class EngineSyncError(WorkerError):
    """A transfer that failed on the engines' side; names the engine. Another try, without it, may succeed."""
