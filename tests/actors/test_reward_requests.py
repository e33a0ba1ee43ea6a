"""What waits to be scored, and a worker's share of it: no Ray."""

from __future__ import annotations

import asyncio

import pytest

from actors.reward_requests import MAX_BATCH, PendingScores, ScoreQueue
from grpo_ray.errors import WorkerError
from grpo_ray.types import SampleInfo, ScoreRequest

REQUEST = ScoreRequest(SampleInfo("rows/0/1", 0, 1, 3, 0, "stop", "rollout-0", None, 0), "", None, {})


def pending(*sizes: int) -> list[PendingScores]:
    return [PendingScores([REQUEST] * size) for size in sizes]


def queue_of(*sizes: int) -> ScoreQueue:
    queue = ScoreQueue()
    for one in pending(*sizes):
        queue.put(one)
    return queue


def sizes(batch: list[PendingScores]) -> list[int]:
    return [one.num_samples for one in batch]


async def shares(queue: ScoreQueue, num_workers: int) -> list[list[int]]:
    taken = []
    while len(queue):
        taken.append(sizes(queue.take(num_workers)))
    return taken


@pytest.mark.parametrize(
    ("waiting", "num_workers", "expected"),
    [
        ([1] * 8, 4, [[1, 1], [1, 1], [1], [1], [1], [1]]),
        ([4, 4, 4], 1, [[4, 4, 4]]),
        ([200, 1], 2, [[200], [1]]),
        ([1] * 70, 1, [[1] * MAX_BATCH, [1] * (70 - MAX_BATCH)]),
    ],
)
def test_a_worker_takes_its_share_of_what_waits_and_at_least_one_call(
    waiting: list[int], num_workers: int, expected: list[list[int]]
) -> None:
    async def take() -> list[list[int]]:
        return await shares(queue_of(*waiting), num_workers)

    assert asyncio.run(take()) == expected


def test_what_a_dead_worker_held_comes_first_and_in_order() -> None:
    async def work() -> None:
        queue = queue_of(1, 2, 3)
        batch = [*queue.take(6), *queue.take(1)[:1]]
        assert sizes(batch) == [1, 2]
        queue.put_back(batch)
        assert sizes(queue.take(1)) == [1, 2]

    asyncio.run(work())


def test_calls_that_nobody_waits_for_are_not_handed_out_and_samples_are_counted() -> None:
    async def work() -> None:
        queue = queue_of(2, 3)
        extra = pending(5)[0]
        queue.put(extra)
        assert (len(queue), queue.num_samples) == (3, 10)
        extra.cancel()
        assert sizes(queue.take(1)) == [2, 3]
        assert (len(queue), queue.num_samples) == (0, 0)

    asyncio.run(work())


def test_a_pool_that_fails_answers_all_that_wait() -> None:
    async def work() -> None:
        queue = ScoreQueue()
        first, second = pending(1, 1)
        queue.put(first)
        queue.put(second)
        first.cancel()
        queue.fail(WorkerError("the pool is closed"))
        assert (len(queue), queue.num_samples) == (0, 0)
        with pytest.raises(WorkerError, match="closed"):
            await second

    asyncio.run(work())
