"""What waits to be scored, and a worker's share of it: no Ray."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import pytest

from actors.reward.requests import MAX_BATCH, PendingScores, ScoreDispatch, ScoreQueue
from grpo_ray.errors import WorkerError
from grpo_ray.telemetry.activity import Activity
from grpo_ray.types import SampleInfo, Score, ScoreRequest, ScoreStatus

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
        batch = [*queue.take(6), *queue.take(2)]
        assert (sizes(batch), queue.num_samples) == ([1, 2], 3)
        queue.put_back(batch)
        assert sizes(queue.take(1)) == [1, 2, 3]

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


@dataclass(eq=False)
class Worker:
    """A `ScoringWorker` whose calls the test answers."""

    batch: list[PendingScores] = field(default_factory=list)
    due: float = math.inf
    activity: Activity = field(default_factory=lambda: Activity("reward-0"))
    calls: list[list[int]] = field(default_factory=list)
    """Of each, the samples of its groups."""
    is_dead: bool = False

    def score(self, groups: list[list[ScoreRequest]]) -> asyncio.Future[list[list[Score]]]:
        if self.is_dead:
            raise WorkerError("it is dead")
        self.calls.append([len(group) for group in groups])
        self.answer = asyncio.get_running_loop().create_future()
        return self.answer

    def finish(self) -> None:
        self.answer.set_result([[Score(ScoreStatus.OK, 1.0, ())] * num for num in self.calls[-1]])


class Bench:
    """Dispatch over workers that are all free."""

    def __init__(self, num_workers: int) -> None:
        self.workers = {i: Worker() for i in range(num_workers)}
        self.failed: list[str] = []
        self.dispatch = ScoreDispatch(
            self.workers, lambda num_samples: 100.0 * num_samples, on_answered=self.free, on_failed=self.note
        )
        for worker in self.workers.values():
            self.dispatch.free(worker)

    def free(self, worker: Worker) -> None:
        self.dispatch.free(worker)

    def note(self, worker: Worker, error: BaseException, batch: list[PendingScores]) -> None:
        self.failed.append(f"{error}: {sizes(batch)}")

    def score(self, size: int) -> PendingScores:
        return self.dispatch.score([REQUEST] * size)

    async def turn(self) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)


def test_calls_made_together_are_shared_among_idle_workers_and_the_one_that_answers_takes_more() -> None:
    async def work() -> None:
        bench = Bench(2)
        asked = [bench.score(1) for _ in range(6)]
        first, second = bench.workers.values()
        assert (first.calls, second.calls) == ([], []), "what this turn brings comes along"
        await bench.turn()
        assert (first.calls, second.calls) == ([[1, 1, 1]], [[1, 1]])
        assert first.due == pytest.approx(asyncio.get_running_loop().time() + 300.0, abs=5.0)
        assert bench.dispatch.take_most_waiting() == 6
        second.finish()
        await bench.turn()
        assert second.calls == [[1, 1], [1]]
        first.finish()
        second.finish()
        assert [[s.value for s in scores] for scores in await asyncio.gather(*asked)] == [[1.0]] * 6
        await bench.turn()
        assert (first.batch, first.due, bench.dispatch.num_waiting) == ([], math.inf, 0)

    asyncio.run(work())


@pytest.mark.parametrize("at_once", [True, False])
def test_what_a_lost_worker_held_waits_again_and_goes_to_an_idle_one(at_once: bool) -> None:
    async def work() -> None:
        bench = Bench(2)
        lost, other = bench.workers.values()
        lost.is_dead = at_once
        asked = bench.score(2)
        await bench.turn()
        if not at_once:
            lost.answer.set_exception(WorkerError("it is dead"))
            await bench.turn()
            assert bench.dispatch.num_waiting == 2
            bench.dispatch.hand_out()
        assert bench.failed == ["it is dead: [2]"]
        assert (lost.batch, lost.due, other.calls) == ([], math.inf, [[2]])
        other.finish()
        assert len(await asked) == 2

    asyncio.run(work())


def test_a_worker_that_is_withdrawn_gets_nothing_more() -> None:
    async def work() -> None:
        bench = Bench(2)
        idle, busy = bench.workers.values()
        assert bench.dispatch.withdraw(idle)
        bench.score(1)
        await bench.turn()
        assert (idle.calls, busy.calls) == ([], [[1]])
        assert not bench.dispatch.withdraw(busy), "it has work to finish"

    asyncio.run(work())


def test_a_broken_pool_says_the_first_error_to_whoever_comes_and_closing_answers_those_whose_call_is_under_way() -> (
    None
):
    async def work() -> None:
        bench = Bench(1)
        held, waiting = bench.score(64), bench.score(1)
        await bench.turn()
        bench.dispatch.close(WorkerError("the pool is closed"))
        bench.dispatch.fail(WorkerError("and something else"))
        for asked in (held, waiting, bench.score(1)):
            with pytest.raises(WorkerError, match="the pool is closed"):
                await asked

    asyncio.run(work())


def test_no_samples_have_no_scores_at_once() -> None:
    async def work() -> None:
        bench = Bench(1)
        assert await bench.score(0) == []
        assert bench.workers[0].calls == []

    asyncio.run(work())
