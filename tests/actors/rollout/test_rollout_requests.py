"""Requests on their way to engines and back, over engines that only keep what they are given: no Ray, no vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from actors.rollout.actor import Outcome
from actors.rollout.balance import EngineBalance
from actors.rollout.poison import blame, is_suspect, verdict
from actors.rollout.requests import MAX_ABORTS, PendingSample, RequestQueue
from grpo_ray.errors import DataError, DeadlineError, PoisonedError, WorkerError
from grpo_ray.types import SampleInfo, SampleRequest, SamplingParams

PARAMS = SamplingParams(1.0, 1.0, -1, 0.0, 8, ())


@dataclass(eq=False)
class Engine:
    """A `SamplingEngine` that remembers what it was told."""

    index: int
    alive: bool = True
    leaving: bool = False
    version: int | None = 0
    place: int | None = None
    work: dict[int, PendingSample] = field(default_factory=dict)
    submitted: list[list[str]] = field(default_factory=list)
    cancelled: list[int] = field(default_factory=list)
    finished: int = 0

    def __post_init__(self) -> None:
        self.name = f"rollout-{self.index}"

    @property
    def load(self) -> int:
        return len(self.work)

    @property
    def tries_suspect(self) -> bool:
        return len(self.work) == 1 and is_suspect(next(iter(self.work.values())))

    def submit(self, requests: list[tuple[int, SampleRequest]]) -> None:
        self.submitted.append([request.prompt_id for _, request in requests])

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)

    def has_finished(self, info: SampleInfo) -> None:
        self.finished += 1

    def show(self) -> None:
        pass

    def state(self, version: int) -> str:
        return "is busy" if self.version == version else "waits for the current weights"


@dataclass
class Bench:
    """A queue over `num_engines` engines that sample 4 requests at once, and so get 5."""

    num_engines: int = 2
    now: float = 0.0
    idle: list[str] = field(default_factory=list)
    syncs: int = 0

    def __post_init__(self) -> None:
        self.engines = {i: Engine(i) for i in range(self.num_engines)}
        self.queue = RequestQueue(
            self.engines,
            4,
            on_leaving_idle=lambda engine: self.idle.append(engine.name),
            on_stale=self._count_sync,
            clock=lambda: self.now,
        )
        for engine in self.engines.values():
            self.queue.engine_changed(engine)

    def _count_sync(self) -> None:
        self.syncs += 1

    def ask(self, *prompts: str) -> list[PendingSample]:
        return [self.queue.add(SampleRequest(prompt, i, [1], 7, PARAMS)) for i, prompt in enumerate(prompts)]

    def finish(self, engine: Engine, *samples: PendingSample, ref: str = "ref") -> None:
        outcomes = [Outcome(s.number, info_of(s, engine.name, row)) for row, s in enumerate(samples)]
        self.queue.settle(engine, outcomes, ref)

    def kill(self, engine: Engine) -> list[PendingSample]:
        engine.alive, engine.version = False, None
        return self.queue.take_back(engine)

    def revive(self, engine: Engine) -> None:
        engine.alive, engine.version = True, 0
        self.queue.engine_changed(engine)


def info_of(sample: PendingSample, worker: str, row: int) -> SampleInfo:
    return SampleInfo(sample.prompt_id, sample.request.index, 1, 3, 0, "stop", worker, None, row)


def on_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


async def turn() -> None:
    """Of the event loop: what was asked for is handed out."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


@on_loop
async def test_requests_made_together_are_spread_over_the_engines_in_one_call_each() -> None:
    bench = Bench()
    bench.ask(*"abcdef")
    assert [e.submitted for e in bench.engines.values()] == [[], []]
    await turn()
    assert [e.submitted for e in bench.engines.values()] == [[["a", "c", "e"]], [["b", "d", "f"]]]


@on_loop
async def test_requests_beyond_the_places_wait_and_go_to_whoever_has_one_first() -> None:
    bench = Bench()
    samples = bench.ask(*map(str, range(12)))
    await turn()
    assert [e.load for e in bench.engines.values()] == [5, 5]
    assert (bench.queue.num_queued, bench.queue.take_most_waiting(), bench.queue.take_most_waiting()) == (2, 4, 0)
    bench.finish(bench.engines[1], samples[1], samples[3])
    await turn()
    assert bench.engines[1].submitted[1:] == [["10", "11"]]
    assert bench.queue.num_queued == 0


@on_loop
async def test_a_finished_sample_points_to_its_row_in_what_came_along() -> None:
    bench = Bench(1)
    first, second = bench.ask("a", "b")
    await turn()
    bench.finish(bench.engines[0], second, first, ref="samples")
    assert [(i.ref, i.row, i.prompt_id) for i in (await first, await second)] == [
        ("samples", 1, "a"),
        ("samples", 0, "b"),
    ]
    assert (len(bench.queue), bench.engines[0].finished) == (0, 2)


@on_loop
async def test_work_of_a_dead_engine_comes_before_what_was_asked_for_later() -> None:
    bench = Bench(1)
    bench.ask(*"abcde")
    later = bench.ask("later")
    await turn()
    bench.queue.requeue(bench.kill(bench.engines[0]))
    assert bench.queue.num_queued == 6
    bench.revive(bench.engines[0])
    await turn()
    assert bench.engines[0].submitted[1:] == [["a", "b", "c", "d", "e"]]
    assert bench.queue.num_queued == 1
    assert not later[0].done()


@on_loop
async def test_a_cancelled_sample_is_taken_from_its_engine_or_never_handed_out() -> None:
    bench = Bench(1)
    samples = bench.ask(*"abcdef")
    await turn()
    samples[5].cancel()
    samples[2].cancel()
    await turn()
    assert bench.engines[0].cancelled == [samples[2].number]
    assert (bench.engines[0].load, len(bench.queue)) == (4, 4)
    assert bench.engines[0].submitted == [["a", "b", "c", "d", "e"]]
    bench.finish(bench.engines[0], samples[2])
    assert samples[2].cancelled()


@on_loop
async def test_a_refused_request_fails_and_an_aborted_one_is_tried_again_a_few_times() -> None:
    bench = Bench(1)
    refused, aborted = bench.ask("bad", "unlucky")
    engine = bench.engines[0]
    await turn()
    bench.queue.settle(engine, [Outcome(refused.number, None, "refused", "too long")], None)
    with pytest.raises(DataError, match="rollout-0 refuses sample 0 of prompt bad: too long"):
        await refused
    for _ in range(MAX_ABORTS):
        assert not aborted.done()
        bench.queue.settle(engine, [Outcome(aborted.number, None, "aborted", "preempted")], None)
        await turn()
    with pytest.raises(WorkerError, match="ended 3 times without a sample, last on rollout-0: preempted"):
        await aborted
    assert sum(calls.count("unlucky") for calls in engine.submitted) == MAX_ABORTS


@on_loop
async def test_engines_with_old_weights_get_nothing_and_a_sync_is_asked_for() -> None:
    bench = Bench()
    bench.engines[1].version = 3
    bench.queue.use_version(3)
    bench.ask(*"ab")
    await turn()
    assert [e.submitted for e in bench.engines.values()] == [[], [["a", "b"]]]
    assert (bench.queue.any_stale, bench.syncs) == (True, 1)
    bench.engines[0].version = 3
    bench.queue.use_version(3)
    bench.ask("c")
    await turn()
    assert bench.engines[0].submitted == [["c"]]
    assert (bench.queue.any_stale, bench.syncs) == (False, 1)


@on_loop
async def test_an_engine_that_is_to_leave_gets_nothing_new_and_says_when_it_is_idle() -> None:
    bench = Bench(1)
    first, second = bench.ask("a", "b")
    await turn()
    engine = bench.engines[0]
    engine.leaving = True
    bench.queue.engine_changed(engine)
    bench.ask("c")
    await turn()
    bench.finish(engine, first)
    assert (engine.submitted, bench.idle) == ([["a", "b"]], [])
    bench.finish(engine, second)
    assert bench.idle == ["rollout-0"]


@on_loop
async def test_the_deadline_of_a_sample_counts_from_its_engine_or_from_the_last_progress_of_any() -> None:
    bench = Bench(1)
    samples = bench.ask(*map(str, range(6)))
    await turn()
    bench.now = 60.0
    bench.finish(bench.engines[0], samples[0])
    await turn()
    bench.now = 101.0
    bench.queue.fail_late(100.0)
    assert [s.done() for s in samples] == [True, True, True, True, True, False]
    with pytest.raises(DeadlineError, match=r"rollout-0 did not finish sample 1 of prompt 1 within 100 s"):
        await samples[1]
    await turn()
    bench.queue.requeue(bench.kill(bench.engines[0]))
    bench.now = 201.0
    bench.queue.fail_late(100.0)
    assert not samples[5].done(), "it was queued 100 s ago, and not longer"
    bench.now = 201.5
    bench.queue.fail_late(100.0)
    with pytest.raises(DeadlineError, match=r"no engine took sample 5 of prompt 5 for 100 s .*rollout-0 waits"):
        await samples[5]


@on_loop
async def test_a_suspect_prompt_is_tried_alone_while_others_pass_it() -> None:
    bench = Bench()
    (suspect,) = bench.ask("suspect")
    suspect.deaths = 2
    others = bench.ask(*"abc")
    await turn()
    assert [e.submitted for e in bench.engines.values()] == [[["suspect"]], [["a", "b", "c"]]]
    (second,) = bench.ask("second")
    second.lone_deaths = 1
    bench.ask("d")
    await turn()
    assert [e.load for e in bench.engines.values()] == [1, 4], "the second suspect waits for an idle engine"
    assert bench.queue.num_queued == 1
    bench.finish(bench.engines[0], suspect)
    await turn()
    assert bench.engines[0].submitted == [["suspect"], ["second"]]
    assert not any(s.done() for s in others)


@on_loop
async def test_a_closed_queue_fails_what_waits_and_what_comes() -> None:
    bench = Bench()
    samples = bench.ask("a")
    await turn()
    bench.queue.close()
    for sample, words in ((samples[0], "was closed"), (bench.ask("b")[0], "is closed")):
        with pytest.raises(WorkerError, match=words):
            await sample
    assert (len(bench.queue), bench.engines[0].cancelled) == (0, [])


@on_loop
async def test_a_poisoned_prompt_fails_with_all_its_samples_and_no_other() -> None:
    bench = Bench(1)
    samples = bench.ask("poison", "poison", "a")
    bench.queue.fail_poisoned("poison", "why")
    for sample in samples[:2]:
        with pytest.raises(PoisonedError, match="why"):
            await sample
    assert not samples[2].done()


@dataclass
class LearnerSnapshot:
    prompt_id: str
    deaths: int = 0
    lone_deaths: int = 0


def test_a_prompt_is_poisoned_when_two_engines_died_over_nothing_else() -> None:
    poison, other = [LearnerSnapshot("p"), LearnerSnapshot("p")], LearnerSnapshot("o")
    assert not blame([*poison, other])
    assert not any(map(is_suspect, [*poison, other])), "one death among others"
    assert not blame([*poison, other])
    assert all(map(is_suspect, [*poison, other])), "a second one"
    assert not blame(poison)
    assert blame(poison)
    assert (other.deaths, other.lone_deaths) == (2, 0)
    text = verdict(poison, "rollout-1", "it was killed")
    assert text.startswith("prompt p ends rollout engines: 4 died while they worked on it, 2 of them on nothing else")
    assert "the last one rollout-1 (it was killed)" in text


def test_deaths_among_others_poison_nobody_however_many() -> None:
    innocent, others = LearnerSnapshot("i"), [LearnerSnapshot(f"o{n}") for n in range(50)]
    assert not any(blame([innocent, other]) for other in others)
    assert (innocent.deaths, innocent.lone_deaths) == (50, 0)


def test_one_death_over_nothing_else_makes_a_prompt_suspect() -> None:
    lone = LearnerSnapshot("p")
    assert not blame([lone])
    assert is_suspect(lone)


def test_the_least_loaded_engine_is_found_whatever_changes() -> None:
    engines = {i: Engine(i) for i in range(4)}
    balance = EngineBalance(engines)
    assert balance.least_loaded(5) is None, "nobody has been looked at"
    for engine in engines.values():
        balance.reconsider(engine)
    for load, index in ((2, 0), (1, 1), (3, 2), (1, 3)):
        engines[index].work = {n: LearnerSnapshot(str(n)) for n in range(load)}  # type: ignore[misc]
        balance.reconsider(engines[index])
    assert balance.least_loaded(5) is engines[1]
    engines[1].leaving = True
    balance.reconsider(engines[1])
    assert balance.least_loaded(5) is engines[3]
    engines[3].alive = False
    balance.reconsider(engines[3])
    assert balance.least_loaded(5) is engines[0]
    assert balance.least_loaded(2) is None
    engines[2].work = {}
    balance.reconsider_later(engines[2])
    assert balance.least_loaded(5) is engines[0], "put off"
    balance.catch_up()
    assert balance.least_loaded(5) is engines[2]
    balance.use_version(1)
    assert balance.least_loaded(5) is None
    assert balance.stale == {engines[0], engines[2]}
