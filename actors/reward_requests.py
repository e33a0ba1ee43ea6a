"""Samples that wait to be scored, and what an idle reward worker takes of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from grpo_ray.answers import Answer
from grpo_ray.types import Score, ScoreRequest

MAX_BATCH = 64
"""Samples in one call: enough to make Ray's share of the cost small, few enough to spread over the workers."""


class PendingScores(Answer[list[Score]]):
    """One call of `RewardPool.score`, and its answer."""

    __slots__ = ("deaths", "requests")

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        super().__init__()
        self.requests = list(requests)
        self.deaths = 0
        """Of workers that held it."""

    @property
    def num_samples(self) -> int:
        return len(self.requests)


class ScoreQueue:
    """Calls that no worker has."""

    def __init__(self) -> None:
        self._queue: deque[PendingScores] = deque()
        self.num_samples = 0
        """In all of them."""

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, pending: PendingScores) -> None:
        self._queue.append(pending)
        self.num_samples += pending.num_samples

    def put_back(self, batch: Sequence[PendingScores]) -> None:
        """Before all others."""
        self._queue.extendleft(reversed(batch))
        self.num_samples += sum(pending.num_samples for pending in batch)

    def take(self, num_workers: int) -> list[PendingScores]:
        """The share of one of so many workers: at least one call if any is wanted still, up to MAX_BATCH samples."""
        share = min(MAX_BATCH, -(-self.num_samples // num_workers))
        batch: list[PendingScores] = []
        taken = 0
        while self._queue and (not batch or taken + self._queue[0].num_samples <= share):
            pending = self._queue.popleft()
            self.num_samples -= pending.num_samples
            if not pending.done():
                batch.append(pending)
                taken += pending.num_samples
        return batch

    def fail(self, error: Exception) -> None:
        """Nobody will score what waits."""
        self.num_samples = 0
        while self._queue:
            pending = self._queue.popleft()
            if not pending.done():
                pending.set_exception(error)
