"""Timeline of all workers, step by step: trace.json, and the busy fraction of each role.

tracks of engines, scorers, learners, controller   ->  record(step, window, ..)  ->  trace.json
                                                                                 ->  {"busy/learner": 0.37, ..}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from grpo_ray.telemetry.activity import NOT_BUSY
from grpo_ray.telemetry.catalogue import matches
from grpo_ray.telemetry.trace_file import TraceFile
from grpo_ray.types import TimeSpan, Track

Interval = tuple[float, float]
ROLES = ("rollout", "reward", "learner")
"""The roles that work; the controller waits for them."""


class Timeline:
    """The timeline of one run. Call `record` after every step, `close` after the last."""

    def __init__(self, path: Path | None) -> None:
        """Create the timeline; `path` is that of trace.json, or None if none is written (`tracking.trace: false`)."""
        self._path = path
        self._file: TraceFile | None = None

    def resume(self, step: int) -> None:
        """Resume after `step`: later steps are removed from the file. Without this call it starts anew."""
        if self._path is not None:
            self._file = TraceFile(self._path, step)

    def record(self, step: int, window: TimeSpan, tracks: Mapping[str, Sequence[Track]]) -> dict[str, float]:
        """Record step `step`, which took the time of `window`; returns its metrics, named as in `grpo_ray.telemetry.catalogue`.

        Args:
            tracks: role -> its workers, each since the last call: activities between two steps are in the file, and in no metric.
        """
        steps = Track("steps", (TimeSpan(f"step {step}", window.start, window.end),))
        self._write(step, {**tracks, "controller": [steps, *tracks.get("controller", ())]})
        return busy_metrics(window, tracks)

    def close(self, step: int, tracks: Mapping[str, Sequence[Track]]) -> None:
        """Record what was done after `step`, the last one."""
        if step > 0:
            self._write(step, tracks)

    def _write(self, step: int, tracks: Mapping[str, Sequence[Track]]) -> None:
        if self._path is None:
            return
        if self._file is None:
            self._file = TraceFile(self._path, 0)
        self._file.append(step, merged(tracks))


def merged(tracks: Mapping[str, Sequence[Track]]) -> dict[str, list[Track]]:
    """One track for each worker, joined where two reports have the same one, in order of time."""
    out: dict[str, list[Track]] = {}
    for role, reports in tracks.items():
        of: dict[str, Track] = {}
        for track in reports:
            before = of.get(track.worker)
            of[track.worker] = track if before is None else _joined(before, track)
        out[role] = list(of.values())
    return out


def _joined(a: Track, b: Track) -> Track:
    return Track(a.worker, tuple(sorted((*a.spans, *b.spans), key=lambda s: s.start)))


def busy_metrics(window: TimeSpan, tracks: Mapping[str, Sequence[Track]]) -> dict[str, float]:
    """The busy fraction of the window for each role, mean over its workers, and the number of workers."""
    out: dict[str, float] = {}
    by_worker = merged({role: tracks.get(role, ()) for role in ROLES})
    busy = {role: [busy_intervals(t, window) for t in by_worker[role]] for role in ROLES}
    busy_s = {role: sum(map(_length, workers)) for role, workers in busy.items()}
    for role, workers in busy.items():
        if workers and window.seconds > 0:
            out[f"busy/{role}"] = busy_s[role] / len(workers) / window.seconds
            out[f"workers/{role}"] = float(len(workers))
    others = union([i for role in ("rollout", "learner") for worker in busy[role] for i in worker])
    if busy["reward"] and others:
        shared = sum(_overlap(worker, others) for worker in busy["reward"])
        out["reward/alone_s"] = (busy_s["reward"] - shared) / len(busy["reward"])
    return out


def sampler_tokens_per_s(metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second from the tokens and busy seconds of each engine, `rollout/0/tokens` and `rollout/0/busy_s`."""
    tokens, busy_s = (
        sum(v for name, v in metrics.items() if name.endswith(what) and matches(name, f"rollout/*/{what}"))
        for what in ("tokens", "busy_s")
    )
    return {"throughput/sampler_tokens_per_s": tokens / busy_s} if busy_s > 0 else {}


def busy_intervals(track: Track, window: TimeSpan) -> list[Interval]:
    """The intervals in which the worker was busy, within the window."""
    first, last = window.start, window.end
    return [
        (s.start if s.start > first else first, s.end if s.end < last else last)
        for s in track.spans
        if s.name not in NOT_BUSY and s.end > first and s.start < last
    ]


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals, in order, without overlaps."""
    out: list[Interval] = []
    for start, end in sorted(intervals):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def _length(intervals: Sequence[Interval]) -> float:
    return sum([end - start for start, end in intervals])


def _overlap(a: Sequence[Interval], b: Sequence[Interval]) -> float:
    """The length of the overlap of two lists of intervals, each in order and without overlaps."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        (start, end), (other_start, other_end) = a[i], b[j]
        seconds = (end if end < other_end else other_end) - (start if start > other_start else other_start)
        if seconds > 0:
            total += seconds
        if end < other_end:
            i += 1
        else:
            j += 1
    return total
