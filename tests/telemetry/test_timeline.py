"""Spans, the trace file and the busy figures, by a clock that is turned by hand."""

from __future__ import annotations

import itertools
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.telemetry.activity import MAX_SPANS, Activity, joined
from grpo_ray.telemetry.catalogue import describe
from grpo_ray.telemetry.timeline import Timeline, busy_metrics, sampler_tokens_per_s, union
from grpo_ray.telemetry.trace_file import TraceFile, read_trace, step_of
from grpo_ray.types import TimeSpan, Track


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def track(worker: str, *spans: tuple[str, float, float]) -> Track:
    return Track(worker, tuple(TimeSpan(*s) for s in spans))


def figures(t: Track) -> list[tuple[str, float, float]]:
    return [(s.name, s.start, s.end) for s in t.spans]


def seconds_by_name(spans: Any) -> dict[str, float]:
    out: dict[str, float] = defaultdict(float)
    for span in spans:
        out[span.name] += span.seconds
    return dict(out)


def never_overlap(spans: Any) -> bool:
    return all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(spans))


def test_a_span_inside_a_span_cuts_the_outer_one() -> None:
    clock = Clock()
    activity = Activity("learner-0", clock)
    with activity.span("update"):
        clock.now = 1001.0
        with activity.span("fetch"):
            clock.now = 1003.0
        clock.now = 1003.5
        taken = activity.take()
        clock.now = 1004.0
    clock.now = 1010.0
    assert figures(taken) == [("update", 1000, 1001), ("fetch", 1001, 1003), ("update", 1003, 1003.5)]
    assert figures(activity.take()) == [("update", 1003.5, 1004)]
    assert activity.busy_s == 4.0


def test_a_report_ends_the_work_that_it_reports() -> None:
    clock = Clock()
    activity = Activity("learner-0", clock)
    with activity.span("update"):
        clock.now = 1001.0
        taken = activity.finish()
        clock.now = 1002.0
    assert figures(taken) == [("update", 1000, 1001)]
    assert activity.take().spans == ()


def test_pauses_and_restarts_are_spans_and_not_busy() -> None:
    clock = Clock()
    activity = Activity("rollout-0", clock)
    for name in ("sampling", "paused", "sampling", "restarting", "", "sampling"):
        activity.enter(name)
        clock.now += 1.0
    assert activity.busy_s == 3.0
    assert [s.name for s in activity.take().spans] == ["sampling", "paused", "sampling", "restarting", "sampling"]


def test_a_clock_that_is_set_back_makes_no_overlap() -> None:
    clock = Clock()
    activity = Activity("rollout-0", clock)
    activity.enter("sampling")
    clock.now = 1005.0
    activity.enter("paused")
    clock.now = 990.0
    activity.enter("sampling")
    clock.now = 1006.0
    assert figures(activity.take()) == [("sampling", 1000, 1005), ("sampling", 1005, 1006)]


def test_many_spans_are_joined_and_their_seconds_stay_exact() -> None:
    clock, rng = Clock(), random.Random(1)
    activity = Activity("learner-0", clock)
    spent: dict[str, float] = defaultdict(float)
    for _ in range(20 * MAX_SPANS):
        name, seconds = rng.choice(("forward_backward", "step", "critic", "")), rng.random()
        activity.enter(name)
        clock.now += seconds
        spent[name] += seconds
    taken = activity.take().spans
    assert len(taken) <= MAX_SPANS
    assert never_overlap(taken)
    assert seconds_by_name(taken) == pytest.approx({name: s for name, s in spent.items() if name})
    assert activity.busy_s == pytest.approx(sum(s for name, s in spent.items() if name))


def test_joining_keeps_within_the_time_of_what_it_joins() -> None:
    spans = [TimeSpan(name, float(i), i + 0.5) for i, name in enumerate("abab")]
    assert joined(spans) == [TimeSpan("a", 0.0, 1.0), TimeSpan("b", 1.0, 2.0)]


WINDOW = TimeSpan("step", 100.0, 110.0)


def test_busy_is_the_part_of_the_step_that_a_mean_worker_worked() -> None:
    out = busy_metrics(
        WINDOW,
        {
            "rollout": [
                track("rollout-0", ("sampling", 98, 104), ("paused", 104, 105)),  # 4 s inside
                track("rollout-1", ("sampling", 100, 102), ("sampling", 109, 111)),  # 3 s inside
            ],
            "reward": [track("reward-0", ("scoring", 103, 106)), track("reward-1")],
            "learner": [track("learner-0", ("update", 105, 108)), track("learner-0", ("weights", 108, 108.5))],
            "controller": [track("controller", ("rollout", 100, 110))],
        },
    )
    assert out == {
        "busy/rollout": pytest.approx(0.35),
        "workers/rollout": 2.0,
        "busy/reward": pytest.approx(0.15),
        "workers/reward": 2.0,
        "busy/learner": pytest.approx(0.35),
        "workers/learner": 1.0,
        # reward-0 from 104 to 105: before it rollout-0 samples, after it the learner learns; the mean over two workers.
        "reward/alone_s": pytest.approx(0.5),
    }
    assert [name for name in out if describe(name)[0] == name] == []


def test_the_spans_of_a_role_in_the_file_add_up_to_its_busy_figure(tmp_path: Path) -> None:
    rng, clock = random.Random(3), Clock()
    workers = {f"{role}-{i}": Activity(f"{role}-{i}", clock) for role in ("rollout", "learner") for i in range(2)}
    timeline = Timeline(tmp_path / "trace.json")
    busy: dict[str, float] = defaultdict(float)
    windows = []
    for step in range(1, 6):
        start = clock.now
        for _ in range(50):
            rng.choice(list(workers.values())).enter(rng.choice(("sampling", "update", "paused", "")))
            clock.now += rng.random()
        window = TimeSpan("step", start, clock.now)
        windows.append(window)
        tracks = {
            role: [a.take() for name, a in workers.items() if name.startswith(role)] for role in ("rollout", "learner")
        }
        figures = timeline.record(step, window, tracks)
        for role in ("rollout", "learner"):
            busy[role] += figures[f"busy/{role}"] * window.seconds * figures[f"workers/{role}"]
    events = json.loads((tmp_path / "trace.json").read_text())
    for role, seconds in busy.items():
        spans = [e for e in events if e["ph"] == "X" and e["cat"] == role and e["name"] != "paused"]
        assert sum(e["dur"] for e in spans) / 1e6 == pytest.approx(seconds, abs=1e-3)
    threads: dict[Any, list[Any]] = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            threads[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    assert len(threads) == 5, "four workers and the steps"
    for spans in threads.values():
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans)))


def test_sampled_tokens_by_the_busy_seconds_of_all_engines() -> None:
    stats = {"rollout/0/tokens": 300.0, "rollout/1/tokens": 100.0, "rollout/0/busy_s": 3.0, "rollout/1/busy_s": 2.0}
    assert sampler_tokens_per_s(stats | {"rollout/0/busy": 0.9}) == {"throughput/sampler_tokens_per_s": 80.0}
    assert sampler_tokens_per_s({"rollout/0/tokens": 3.0, "rollout/0/busy_s": 0.0}) == {}


def write(file: TraceFile, step: int, worker: str = "rollout-0") -> None:
    file.append(step, {"rollout": [track(worker, ("sampling", step, step + 0.5), ("paused", step + 0.5, step + 0.75))]})


def steps_of(path: Path) -> list[int]:
    return [step_of(e) for e in read_trace(path) if e["name"] == "sampling"]


def test_every_event_is_what_the_viewers_ask_for_and_the_file_is_json_after_every_step(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(path, 0)
    assert json.loads(path.read_text()) == []
    for step, worker in ((1, "rollout-0"), (2, "rollout-1"), (3, "rollout-0")):
        write(file, step, worker)
        json.loads(path.read_text())
    events = json.loads(path.read_text())
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(2, 1): "rollout-0", (2, 2): "rollout-1"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rollout"]
    assert next(e for e in events if e["ph"] == "X") == {
        "ph": "X",
        "name": "sampling",
        "cat": "rollout",
        "ts": 1_000_000,
        "dur": 500_000,
        "pid": 2,
        "tid": 1,
        "args": {"step": 1},
    }


def test_a_file_torn_in_mid_write_is_read_and_gone_on_with_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(path, 0)
    for step in (1, 2, 3, 4):
        write(file, step)
    path.write_bytes(path.read_bytes()[:-40])
    assert steps_of(path) == [1, 2, 3, 4]
    again = TraceFile(path, 2)
    write(again, 3)
    write(again, 4, "rollout-7")
    assert steps_of(path) == [1, 2, 3, 4]
    events = json.loads(path.read_text())
    assert {(e["args"]["name"], e["tid"]) for e in events if e["name"] == "thread_name"} == {
        ("rollout-0", 1),
        ("rollout-7", 2),
    }


def test_the_file_keeps_the_newest_steps_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    file = TraceFile(path, 0, limit_bytes=4000)
    for step in range(1, 101):
        write(file, step)
        assert path.stat().st_size <= 4000
    steps = steps_of(path)
    assert steps == list(range(steps[0], 101))
    assert len(steps) >= 5
    assert [e["args"]["name"] for e in json.loads(path.read_text()) if e["name"] == "thread_name"] == ["rollout-0"]


def test_union_of_intervals() -> None:
    assert union([(5, 6), (1, 3), (2, 4), (4, 4.5)]) == [(1, 4.5), (5, 6)]
