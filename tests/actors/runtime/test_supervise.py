"""The one policy for workers, over workers that live in virtual time: no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

from actors.start_timeout import RESTART_FACTOR, RESTART_S, StartTimeout
from actors.supervise import START_WARNING_S, GivenUpError, Supervisor, Worker
from grpo_ray.errors import ConfigError, DeadlineError, WorkerError
from tests.bench.simulated import Cluster, VirtualLoop

LIMIT_S = 600.0


@dataclass
class WorkerGroup:
    """Workers of a kind, the pool that holds them, and where they come from: all that a supervisor needs."""

    starts: list[float | Exception] = field(default_factory=list)
    """Of the next workers: seconds, or what they die of after one."""
    max_restarts: int = 2
    probe_s: float = 20.0
    stop_s: float = 5.0
    stops_in_s: float = 1.0
    answers_probes: bool = True
    busy: bool = True
    events: list[tuple[float, str]] = field(default_factory=list)

    def tell(self, text: str) -> None:
        self.events.append((round(asyncio.get_running_loop().time(), 3), text))

    def __post_init__(self) -> None:
        self.on_trouble: Callable[[str], None] = self.tell

    # The kind

    def make(self, index: int) -> Worker:
        return Worker(index, f"worker-{index}")

    def launch(self, worker: Worker) -> str:
        self.tell(f"launch {worker.name}")
        return f"actor {worker.incarnation} of {worker.name}"

    async def ready(self, worker: Worker, limit_s: float) -> None:
        start = self.starts.pop(0) if self.starts else 1.0
        if isinstance(start, Exception):
            await asyncio.sleep(1.0)
            raise start
        try:
            await asyncio.wait_for(asyncio.sleep(start), limit_s)
        except TimeoutError:
            raise DeadlineError(f"not within {limit_s:g} s") from None

    def waits_for(self) -> str:
        return "it waits for a place"

    def backoff_s(self, worker: Worker, cause: BaseException) -> float:
        return 10.0 * worker.restarts

    def probe(self, handle: Any) -> Awaitable[None]:
        return asyncio.sleep(0.1 if self.answers_probes else 1e6)

    def stop(self, handle: Any) -> Awaitable[None]:
        return asyncio.sleep(self.stops_in_s)

    # The pool

    def is_busy(self, worker: Worker) -> bool:
        return self.busy

    def worker_started(self, worker: Worker) -> None:
        self.tell(f"started {worker.name}")

    def worker_hangs(self, worker: Worker, incarnation: int) -> None:
        self.tell(f"hangs {worker.name} in life {incarnation}")

    def worker_restarts(self, worker: Worker, cause: BaseException) -> None:
        self.tell(f"restart {worker.name}: {cause}")

    # The source

    def start(self, actor: type, *args: Any, **options: Any) -> Any:
        raise AssertionError("`launch` starts nothing")

    def kill(self, handle: Any) -> None:
        self.tell(f"kill {handle}")

    def told(self, word: str) -> list[float]:
        """When."""
        return [when for when, text in self.events if text.startswith(word)]


def in_virtual_time(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(Cluster())) as runner:
        runner.run(work)


def supervisor(crew: WorkerGroup, number: int = 1) -> Supervisor[Worker]:
    return Supervisor(crew, crew, crew, number, LIMIT_S)


async def died(held: Supervisor[Worker], index: int = 0) -> Worker:
    worker = held.workers[index]
    worker.alive = False
    held.kill(worker)
    return worker


def test_workers_start_side_by_side_and_every_life_has_a_number_of_its_own() -> None:
    crew = WorkerGroup(starts=[3.0, 1.0, 2.0])

    async def work() -> None:
        held = supervisor(crew, 3)
        await held.start_all()
        assert asyncio.get_running_loop().time() == pytest.approx(3.0)
        assert held.num_alive == 3
        worker = await died(held)
        assert await held.restart(worker, WorkerError("x"))
        assert sorted(w.incarnation for w in held.workers.values()) == [1, 2, 3]

    in_virtual_time(work())


def test_the_first_start_that_fails_fails_all_of_them_with_its_own_error() -> None:
    crew = WorkerGroup(starts=[100.0, WorkerError("worker-1 died")])

    async def work() -> None:
        held = supervisor(crew, 2)
        with pytest.raises(WorkerError, match="worker-1 died"):
            await held.start_all()
        assert asyncio.get_running_loop().time() == pytest.approx(1.0)
        await held.close()
        assert len(crew.told("kill")) == 2

    in_virtual_time(work())


def test_a_worker_is_restarted_later_and_later_and_given_up_after_so_many_deaths() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew, 2)
        await held.start_all()
        worker = await died(held)
        crew.starts = [WorkerError("no good"), WorkerError("worse")]
        with pytest.raises(GivenUpError, match="worker-0 is given up: worse") as error:
            await held.restart(worker, WorkerError("it was killed"))
        assert not error.value.late
        assert (worker.restarts, held.num_restarts, held.num_alive) == (2, 2, 1)
        # 10 s and a start of one, 20 s and another.
        assert asyncio.get_running_loop().time() == pytest.approx(1 + 10 + 1 + 20 + 1)
        assert [text for _, text in crew.events if text.startswith("restart")] == [
            "restart worker-0: it was killed",
            "restart worker-0: no good",
        ]
        assert [text for _, text in crew.events if text.startswith("kill")] == [
            f"kill actor {n} of worker-0" for n in (0, 2, 3)
        ]

    in_virtual_time(work())


def test_a_death_after_something_was_finished_counts_anew() -> None:
    crew = WorkerGroup(max_restarts=1)

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        for _ in range(5):
            worker = await died(held)
            assert await held.restart(worker, WorkerError("x"))
            worker.restarts = 0
        worker = await died(held)
        assert await held.restart(worker, WorkerError("x"))
        with pytest.raises(GivenUpError):
            await held.restart(await died(held), WorkerError("x"))

    in_virtual_time(work())


def test_a_start_that_hangs_is_begun_again_with_twice_the_time_and_counts_as_no_death() -> None:
    crew = WorkerGroup(max_restarts=1)

    async def work() -> None:
        held = supervisor(crew, 2)
        await held.start_all()
        worker = await died(held)
        crew.starts = [1e6] * 20
        task = asyncio.create_task(held.restart(worker, WorkerError("its node is gone")))
        await asyncio.sleep(10_000.0)
        assert not task.done(), "another one is alive"
        limits = [RESTART_S + RESTART_FACTOR]
        while len(limits) < 7:
            limits.append(min(2 * limits[-1], LIMIT_S))
        launched = crew.told("launch worker-0")[1:9]
        assert [b - a - 10.0 for a, b in pairwise(launched)] == pytest.approx(limits)
        crew.starts = []
        assert await task
        assert worker.alive

    in_virtual_time(work())


def test_a_pool_without_any_worker_is_given_up_when_none_has_started_in_time() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        worker = await died(held)
        crew.starts = [1e6] * 100
        with pytest.raises(GivenUpError) as error:
            await held.restart(worker, WorkerError("x"))
        assert error.value.late
        assert asyncio.get_running_loop().time() == pytest.approx(1.0 + LIMIT_S)

    in_virtual_time(work())


def test_an_error_that_no_other_start_would_mend_ends_the_restart_at_once() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        crew.starts = [ConfigError("no such model")]
        with pytest.raises(ConfigError, match="no such model"):
            await held.restart(await died(held), WorkerError("x"))
        assert held.num_restarts == 1

    in_virtual_time(work())


def test_a_worker_that_is_to_leave_is_not_started_once_more() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew, 2)
        await held.start_all()
        worker = await died(held)
        crew.starts = [WorkerError("y")] * 3
        task = asyncio.create_task(held.restart(worker, WorkerError("x")))
        await asyncio.sleep(5.0)
        worker.leaving = True
        assert await task is False
        assert held.num_restarts == 1

    in_virtual_time(work())


def test_a_start_that_takes_long_is_reported_with_what_it_may_wait_for() -> None:
    crew = WorkerGroup(starts=[1.0, START_WARNING_S + 5, START_WARNING_S - 5])

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        for _ in range(2):
            (worker,), _ = held.scale(len(held.workers) + 1, lambda w: w.index)
            await held.join(worker)
        assert [text for _, text in crew.events if "has not started" in text] == [
            "worker-1 has not started for 60 s: it waits for a place"
        ]

    in_virtual_time(work())


def test_a_worker_that_can_not_join_is_tried_a_few_times() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        (first, second), _ = held.scale(3, lambda w: w.index)
        crew.starts = [WorkerError("a"), 1.0]
        await held.join(first, tries=3)
        assert first.alive
        crew.starts = [WorkerError("b"), WorkerError("c"), 1.0]
        with pytest.raises(WorkerError, match="c"):
            await held.join(second, tries=2)
        assert [text for _, text in crew.events if "was to join" in text] == [
            "worker-1 was to join and does not start, it is tried again: a",
            "worker-2 was to join and does not start, it is tried again: b",
        ]

    in_virtual_time(work())


def test_scaling_uses_free_places_again_and_lets_those_leave_that_are_worth_least() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew, 4)
        await held.start_all()
        new, leaving = held.scale(2, lambda w: {0: 9, 1: 1, 2: 5, 3: 2}[w.index])
        assert (new, [w.index for w in leaving]) == ([], [1, 3])
        assert all(w.leaving for w in leaving)
        held.remove(leaving[0])
        new, leaving = held.scale(4, lambda w: w.index)
        assert ([w.index for w in new], leaving) == ([1, 4], [])
        assert sorted(held.workers) == [0, 1, 2, 3, 4], "worker 3 has not left yet"

    in_virtual_time(work())


def test_a_worker_that_leaves_ends_by_itself_or_by_force_and_reports_what_it_did() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew, 2)
        await held.start_all()
        worker = held.workers[0]
        worker.activity.enter("busy")
        task = held.keep(worker, asyncio.sleep(1e6))
        held.remove(worker)
        await asyncio.sleep(0.5)
        assert (task.cancelled(), held.num_alive, crew.told("kill")) == (True, 1, [])
        assert [t.worker for t in held.take_tracks()] == ["worker-1", "worker-0"]
        assert [t.worker for t in held.take_tracks()] == ["worker-1"]
        await asyncio.sleep(1.0)
        assert crew.told("kill") == [2.0], "a second to stop"
        crew.stops_in_s = 1e6
        await held.close()
        assert crew.told("kill") == [2.0, 2.5 + crew.stop_s]

    in_virtual_time(work())


def test_a_pool_that_closes_waits_for_those_that_leave() -> None:
    crew = WorkerGroup(stops_in_s=4.0)

    async def work() -> None:
        held = supervisor(crew, 2)
        await held.start_all()
        endless = held.spawn(asyncio.sleep(1e6))
        held.remove(held.workers[0])
        await asyncio.sleep(0)
        crew.stops_in_s = 1.0
        await held.close()
        assert endless.cancelled()
        assert (crew.told("kill"), asyncio.get_running_loop().time()) == ([2.0, 5.0], 5.0)

    in_virtual_time(work())


def test_a_busy_worker_that_does_not_answer_is_reported_with_the_life_that_hangs() -> None:
    crew = WorkerGroup()

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        held.spawn(held.watch(lambda: 10.0))
        await asyncio.sleep(95.0)
        assert crew.told("hangs") == []
        crew.answers_probes = False
        crew.busy = False
        await asyncio.sleep(100.0)
        assert crew.told("hangs") == [], "it has nothing to hang over"
        crew.busy = True
        await asyncio.sleep(40.0)
        # It was busy from 196 s on, and is looked at every ten, from the end of its start on.
        assert crew.events[-1] == (201.0 + crew.probe_s, "hangs worker-0 in life 0")

    in_virtual_time(work())


def test_a_new_life_is_probed_though_the_last_one_has_not_answered_yet() -> None:
    crew = WorkerGroup(probe_s=1000.0, answers_probes=False)

    async def work() -> None:
        held = supervisor(crew)
        await held.start_all()
        held.spawn(held.watch(lambda: 10.0))
        await asyncio.sleep(15.0)
        assert held.workers[0].probe is not None
        assert await held.restart(await died(held), WorkerError("x"))
        assert held.workers[0].probe is None
        await asyncio.sleep(15.0)
        assert held.workers[0].probe is not None

    in_virtual_time(work())


def test_a_start_timeout_grows_with_the_longest_start_and_never_beyond_the_limit() -> None:
    now = [0.0]
    timeout = StartTimeout(100.0, lambda: now[0])

    def start(seconds: float) -> None:
        with timeout.measured():
            now[0] += seconds

    assert timeout.again_s == 100.0, "nothing is known"
    start(2.0)
    start(1.0)
    assert (timeout.longest_s, timeout.again_s) == (2.0, RESTART_S + 2 * RESTART_FACTOR)
    start(50.0)
    assert timeout.again_s == 100.0
    assert [timeout.doubled(s) for s in (30.0, 60.0)] == [60.0, 100.0]
    timeout.died()
    now[0] += 40.0
    assert timeout.left_s == 60.0


def test_a_start_that_fails_says_nothing_of_how_long_starts_take() -> None:
    now = [0.0]
    timeout = StartTimeout(100.0, lambda: now[0])

    def fail() -> None:
        with timeout.measured():
            now[0] += 70.0
            raise WorkerError("died")

    with pytest.raises(WorkerError):
        fail()
    assert timeout.longest_s == 0.0
