"""trace.json: what every worker did, step by step. Open it in https://ui.perfetto.dev or chrome://tracing.

Trace Event Format, JSON array: one line an event, one thread a worker, grouped in one process a role; `ts` and `dur` in
microseconds, `ts` since 1970. The whole file is valid JSON after every step; of a run killed in mid-write the closing bracket is
missing, which both viewers accept.

An event takes about 130 bytes, a step of a small run some 40 events. The file never grows beyond LIMIT_BYTES: the older half of
its steps goes when it would.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_ray import json_text
from grpo_ray.files import written_aside
from grpo_ray.types import Track

LIMIT_BYTES = 64 << 20
PROCESSES = ("controller", "rollout", "reward", "votes", "learner")
"""The roles in order from top to bottom; process id - 1 is the index."""
_OPEN, _NEXT, _CLOSE = b"[", b",\n", b"\n]\n"
_META = b'{"ph":"M"'


class TraceFile:
    """Writer that appends the events of one step at a time."""

    def __init__(self, path: Path, resume_step: int, limit_bytes: int = LIMIT_BYTES) -> None:
        """Open the file. `resume_step`: continue after it and remove the events of later steps; 0: start anew."""
        self._path = path
        self._limit_bytes = limit_bytes
        kept = [e for e in read_trace(path) if step_of(e) <= resume_step] if resume_step else []
        self._threads = {e["args"]["name"]: (e["pid"], e["tid"]) for e in kept if e["name"] == "thread_name"}
        self._num_threads = Counter(pid for pid, _ in self._threads.values())
        self._rewrite([_line(e) for e in kept])

    def append(self, step: int, tracks: Mapping[str, Sequence[Track]]) -> None:
        """Append a step's events; `tracks` maps roles to workers."""
        lines = [e for role, workers in tracks.items() for track in workers for e in self._events(step, role, track)]
        if not lines:
            return
        new = _NEXT.join(lines)
        if self._path.stat().st_size + len(new) > self._limit_bytes:
            self._drop_older_half()
        with self._path.open("r+b") as file:
            # Overwrites the closing bracket of the step before.
            end = file.seek(-len(_CLOSE), os.SEEK_END)
            file.write((_NEXT if end > len(_OPEN) else b"\n") + new + _CLOSE)

    def _events(self, step: int, role: str, track: Track) -> list[bytes]:
        named = [] if track.worker in self._threads else self._name_thread(role, track.worker)
        pid, tid = self._threads[track.worker]
        # Formatted by hand: json.dumps of thousands of these takes longer than all other work for a step.
        names = {name: json.dumps(name) for name in {s.name for s in track.spans}}
        where = f'"cat":{json.dumps(role)},"pid":{pid},"tid":{tid},"args":{{"step":{step}}}}}'
        lines = []
        for span in track.spans:
            # The difference of the rounded ends: a duration rounded by itself could make neighbours overlap.
            start, end = round(span.start * 1e6), round(span.end * 1e6)
            lines.append(f'{{"ph":"X","name":{names[span.name]},"ts":{start},"dur":{end - start},{where}'.encode())
        return [_line(e) for e in named] + lines

    def _name_thread(self, role: str, worker: str) -> list[dict[str, Any]]:
        pid = PROCESSES.index(role) + 1
        self._num_threads[pid] += 1
        tid = self._num_threads[pid]
        self._threads[worker] = (pid, tid)
        names: list[dict[str, Any]] = []
        if tid == 1:
            names += [
                _meta("process_name", pid, 0, {"name": role}),
                _meta("process_sort_index", pid, 0, {"sort_index": pid}),
            ]
        return [
            *names,
            _meta("thread_name", pid, tid, {"name": worker}),
            _meta("thread_sort_index", pid, tid, {"sort_index": tid}),
        ]

    def _drop_older_half(self) -> None:
        """Drop half of the bytes, and the rest of the step that this cuts. Most lines are not parsed."""
        lines = [line.rstrip(b",\n") for line in self._path.read_bytes().splitlines()[1:-1]]
        middle = len(lines) // 2
        cut = next((step_of(e) for e in map(_event, lines[middle:]) if e["ph"] != "M"), 0)
        first = next((i for i in range(middle, len(lines)) if step_of(_event(lines[i])) > cut), len(lines))
        self._rewrite([line for line in lines[:first] if line.startswith(_META)] + lines[first:])

    def _rewrite(self, lines: Sequence[bytes]) -> None:
        _write(self._path, lines)


def write_trace(path: Path, events: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of these events, replacing an existing one."""
    _write(path, [_line(e) for e in events])


def _write(path: Path, lines: Sequence[bytes]) -> None:
    with written_aside(path, durable=False) as file:
        file.write(_OPEN + (b"\n" + _NEXT.join(lines) if lines else b"") + _CLOSE)


def read_trace(path: Path) -> Iterator[dict[str, Any]]:
    """Every complete event of a `trace.json`; a torn line is skipped; without a file there are no events."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                event = json_text.read(line.rstrip(b",\n"))
            except ValueError:
                continue
            if _is_event(event):
                yield event


def _is_event(event: Any) -> bool:
    """Whether the event has the form that `TraceFile` writes, with numbers that a float can hold."""
    if not isinstance(event, dict) or not isinstance(args := event.get("args"), dict):
        return False
    numbers = [event.get("pid"), event.get("tid"), args.get("step", 0)]
    if event.get("ph") == "X":
        numbers += [event.get("ts"), event.get("dur")]
    elif event.get("ph") != "M" or not isinstance(args.get("name", ""), str):
        return False
    return isinstance(event.get("name"), str) and all(isinstance(n, int) and abs(n) < 1 << 53 for n in numbers)


def step_of(event: Mapping[str, Any]) -> int:
    """The step of the event; 0 for the names of workers, which belong to none."""
    return int(event["args"].get("step", 0))


def _line(event: Mapping[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":"), allow_nan=False).encode()


def _event(line: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json_text.read(line)
    return event


def _meta(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}
