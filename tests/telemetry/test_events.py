"""What a controller keeps of what it told."""

from __future__ import annotations

import sys

from grpo_ray.telemetry.events import Event, EventLog, MessageEvent, PhaseEvent, StepEvent


def of_step(step: int) -> list[Event]:
    return [PhaseEvent("rollout", "", 1, 2), PhaseEvent("update"), StepEvent(step, 10_000, {"step": float(step)})]


def test_who_watches_from_the_start_gets_every_event_once() -> None:
    log, seen, got = EventLog(), 0, []
    for step in range(1, 1501):
        for event in of_step(step):
            log.add(event)
        if step % 100 == 0:
            got += log.since(seen)
            seen = log.count
    assert got == [event for step in range(1, 1501) for event in of_step(step)]
    assert log.since(seen) == []


def test_who_comes_late_gets_the_newest_events_and_before_them_what_was_more_than_a_phase() -> None:
    log = EventLog()
    log.add(MessageEvent("info", "first"))
    for step in range(1, 501):
        for event in of_step(step):
            log.add(event)
    got = log.since(0)
    assert got[0] == MessageEvent("info", "first")
    assert [e.step for e in got if isinstance(e, StepEvent)] == list(range(1, 501))
    assert got[-EventLog.RECENT :] == [e for step in range(1, 501) for e in of_step(step)][-EventLog.RECENT :]
    assert not any(isinstance(e, PhaseEvent) for e in got[: -EventLog.RECENT])


def test_what_is_kept_does_not_grow_with_the_run() -> None:
    log = EventLog()

    def steps(first: int, last: int) -> int:
        for step in range(first, last):
            for event in of_step(step):
                log.add(event)
        return sys.getallocatedblocks()

    before = steps(1, 2000)
    after = steps(2000, 6000)
    assert after - before < 100
    assert len(log.since(0)) == EventLog.RECENT + EventLog.EARLIER
