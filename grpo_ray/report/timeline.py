"""The timeline of report.html from trace.json and metrics.jsonl: the workers' activity in two steps, and the idle time of each
role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_ray.report.charts import Chart
from grpo_ray.telemetry.timeline import ROLES
from grpo_ray.telemetry.trace_file import read_trace, step_of

STEPS_SHOWN = 2
WORKERS_SHOWN = 24
PIXELS = 2000
"""A generous width of the picture in pixels: spans narrower than one are not drawn separately."""
COLOR_ORDER = (
    "rollout",
    "update",
    "sync",
    "log",
    "eval",
    "checkpoint",
    "sampling",
    "paused",
    "restarting",
    "scoring",
    "fetch",
    "old",
    "reference",
    "critic",
    "forward_backward",
    "step",
    "weights",
    "connect",
    "hold",
    "load",
)
"""The span names in the order of the legend; the page gives each a color of its own."""


def timeline_chart(path: Path) -> Chart | None:
    """The chart of two steps from the middle of a run, one row a worker. None without a trace of a whole step."""
    steps = sorted({step_of(e) for e in read_trace(path) if _is_step(e)})
    if not steps:
        return None
    # The first step is a warm-up.
    first = steps[min(max(len(steps) // 2, min(1, len(steps) - 1)), max(0, len(steps) - STEPS_SHOWN))]
    shown = [s for s in steps if s >= first][:STEPS_SHOWN]
    workers: dict[tuple[int, int], str] = {}
    windows: list[tuple[float, float]] = []
    spans: dict[tuple[int, int], list[tuple[str, float, float]]] = {}
    for event in read_trace(path):
        thread = (event["pid"], event["tid"])
        if event["name"] == "thread_name":
            workers[thread] = event["args"]["name"]
        elif event["ph"] == "X" and shown[0] <= step_of(event) <= shown[-1] + 1:
            start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
            if not _is_step(event):
                spans.setdefault(thread, []).append((event["name"], start, end))
            elif step_of(event) in shown:
                windows.append((start, end))
    return _draw(shown, windows, {workers[t]: spans.get(t, []) for t in sorted(workers) if workers[t] != "steps"})


def _draw(
    steps: Sequence[int], windows: Sequence[tuple[float, float]], workers: Mapping[str, list[tuple[str, float, float]]]
) -> Chart:
    origin, end = windows[0][0], windows[-1][1]
    pixel = (end - origin) / PIXELS
    rows = list(workers)[:WORKERS_SHOWN]
    series: dict[str, dict[str, Any]] = {}
    for worker in rows:
        for name, a, b in visible(workers[worker], origin, end, pixel):
            one = series.setdefault(name, {"name": name, "x": [], "y": [], "base": []})
            one["x"].append(round(b - a, 6))
            one["y"].append(worker)
            one["base"].append(round(a - origin, 6))
    order = [*COLOR_ORDER, *(n for n in series if n not in COLOR_ORDER)]
    hidden = f", {WORKERS_SHOWN} of {len(workers)} workers" if len(workers) > WORKERS_SHOWN else ""
    which = f"Step {steps[0]}" if len(steps) == 1 else f"Steps {steps[0]} and {steps[-1]}"
    marks = sorted({round(t - origin, 6) for window in windows for t in window})
    ordered = sorted(series.values(), key=lambda s: order.index(s["name"]))
    return Chart("chart-timeline", f"{which}{hidden}", "timeline", "seconds", ordered, rows, marks)


def visible(
    spans: Iterable[tuple[str, float, float]], start: float, end: float, pixel: float
) -> list[tuple[str, float, float]]:
    """The visible spans within [start, end]: those of one name less than a pixel apart become one, and those then narrower than a
    pixel are left out."""
    out: list[tuple[str, float, float]] = []
    for name, a, b in sorted(spans, key=lambda s: s[1]):
        a, b = max(a, start), min(b, end)
        if b <= a:
            continue
        if out and out[-1][0] == name and a - out[-1][2] < pixel:
            out[-1] = (name, out[-1][1], b)
        else:
            out.append((name, a, b))
    return [s for s in out if s[2] - s[1] >= pixel]


def busy_table(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float, float]]:
    """Rows (role, workers, busy fraction, idle fraction) over the steps of a run, weighted by their seconds."""
    out = []
    for role in ROLES:
        told = [line for line in lines if line.get(f"busy/{role}") is not None and line.get("time/step")]
        whole = sum(line["time/step"] for line in told)
        if whole > 0:
            busy = sum(line[f"busy/{role}"] * line["time/step"] for line in told) / whole
            out.append((role, int(told[-1][f"workers/{role}"]), busy, max(0.0, 1 - busy)))
    return out


def _is_step(event: Mapping[str, Any]) -> bool:
    return event["ph"] == "X" and bool(event["name"].startswith("step "))
