"""The interface between the two sides of a weight sync: engines to send to, ranks that send. It does not import vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict

from grpo_ray.errors import WorkerError
from grpo_ray.types import Track

SENDERS_PART = 0.75
"""The fraction of the deadline of a sync after which the sender gives up by itself: it knows which engine is late, its callers
don't."""
LEAVE_PART = 0.2
"""The fraction in which the engines then have to leave the transfer."""


@dataclass(frozen=True)
class EngineTarget:
    """One live rollout engine, as a weight sync sees it."""

    name: str
    """The engine's name, e.g. `rollout-0`."""
    incarnation: int
    """The number of the life of this name: a restarted engine is another target."""
    handle: Any
    """The Ray handle of its RolloutActor."""
    world_size: int
    """The vLLM workers behind it (tensor and data parallelism): its ranks in the transfer group."""


class SendReport(TypedDict):
    """What rank 0 reports of one transfer; the other ranks return the same with 0 bytes."""

    seconds: float
    bytes: int
    checksum: str
    tracks: NotRequired[list[Track]]
    """What the rank did since its last report; what all ranks did, once the group has gathered them."""


class EnginePool(Protocol):
    """All rollout engines as a weight sync sees them; `actors.rollout.pool.RolloutPool` is one."""

    membership: asyncio.Lock
    """A lock that is held while engines join or leave, and during a weight sync."""
    on_stale: Callable[[], Awaitable[None]] | None
    """The callback for samples that wait for engines with older weights."""
    on_trouble: Callable[[str], None]

    @property
    def version(self) -> int:
        """The version of the weights that the engines hold."""
        ...

    @property
    def stages_weights(self) -> bool:
        """Whether engines receive weights beside sampling, and only pause to swap them in."""
        ...

    @property
    def asleep(self) -> bool:
        """Whether the engines sleep: the learners have the devices, and no engine samples before it is woken."""
        ...

    @property
    def num_unfinished(self) -> int:
        """The number of requested samples that are unfinished."""
        ...

    def engines(self, *, stale_only: bool = False) -> list[EngineTarget]:
        """The live engines; `stale_only`: those that hold other weights than `version`."""
        ...

    async def wait_for_engines(self) -> list[EngineTarget]:
        """The live engines, at least one."""
        ...

    def mark_paused(self, targets: Sequence[EngineTarget], *, paused: bool) -> None: ...

    def mark_synced(self, targets: Sequence[EngineTarget], version: int) -> None: ...

    def mark_unsynced(self, targets: Sequence[EngineTarget]) -> None:
        """Record that a transfer to these engines broke in the middle."""
        ...

    def engine_failed(self, target: EngineTarget, reason: str, *, blame_work: bool) -> None:
        """End and restart the engine. `blame_work`: what it worked on may be the cause."""
        ...


class LearnerWeights(Protocol):
    """The learner group's side of a sync. Each method calls all ranks at once, in the same order, and gathers."""

    unsent: bool
    """Whether an update was handed to the ranks since they last sent: what they would send now is not what the engines hold."""

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        """Call `weights_connect(list(targets), generation)` on every rank. Errors of a rank are raised unchanged."""
        ...

    async def send_weights(self, version: int) -> SendReport:
        """Call `weights_send(version)` on every rank; returns the result of rank 0.

        The ranks must have the calls before this first awaits: the order of this call and of `update` is what makes the
        label `version` true.
        """
        ...


class AsleepError(WorkerError):
    """There is no engine to send to, and none can start before the engines have the devices."""


class EngineSyncError(WorkerError):
    """A transfer that failed on the engines' side; it names the engine. A retry without that engine may succeed."""
