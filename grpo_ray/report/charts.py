"""The curves of report.html as data, from metrics.jsonl; its own script draws them with plotly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from grpo_ray.telemetry.catalogue import LOSSES, ROLES, describe, matches

CHARTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Held-out accuracy", ("eval/accuracy", "eval/*/accuracy", "eval/pass@*", "eval/cons@*"), "percent"),
    ("Reward", ("reward/mean", "reward/*/mean"), ""),
    ("Loss", LOSSES, ""),
    ("Pairs whose chosen answer is ahead", ("pairs/accuracy",), "percent"),
    ("By how much chosen answers are ahead", ("pairs/margin",), ""),
    ("Completion length", ("completions/mean_length", "completions/mean_terminated_length"), ""),
    (
        "Cut answers, groups without signal",
        ("completions/clipped_ratio", "groups/no_signal_fraction"),
        "percent",
    ),
    ("Entropy", ("entropy",), ""),
    ("KL from the reference", ("kl/ref",), ""),
    ("Clipped tokens", ("clip/low", "clip/high"), "percent"),
    ("Sampler against learner", ("mismatch/mean_abs", "mismatch/max_abs"), "log"),
    (
        "Correction for the sampler",
        ("correction/ess", "correction/masked_tokens", "correction/masked_sequences"),
        "percent",
    ),
    ("Gradient norm", ("grad_norm",), ""),
    ("Learning rate", ("lr",), "small"),
    ("Throughput", ("throughput/tokens_per_s", "throughput/rollout_tokens_per_s"), ""),
    ("Staleness", ("staleness/mean", "staleness/max"), ""),
    ("Workers at work, part of the step", ("busy/rollout", "busy/reward", "busy/learner"), "percent"),
    ("Learner: model FLOPs utilization", ("throughput/mfu",), "percent"),
)
"""Charts as (title, metrics or patterns, kind of axis); one without data in a run is not drawn."""

ZERO_BY_DESIGN = ("staleness/*",)
"""Metrics that are 0 in a run that does not sample ahead."""
POINTS_SHOWN = 1500
"""The most points of one curve; a longer run is thinned evenly, and its last point kept."""


@dataclass(frozen=True)
class Chart:
    """One set of axes; `series` has (name, description, steps, values)."""

    id: str
    title: str
    kind: str
    """The kind: empty, `percent`, `log`, `small`, `stack` or `timeline`."""
    unit: str
    series: list[dict[str, Any]]
    """The curves; in a `timeline` one for each span name, with `y` the workers, `base` the starts, `x` the durations."""
    rows: list[str] = field(default_factory=list)
    """The workers of a `timeline`, from top to bottom."""
    marks: list[float] = field(default_factory=list)
    """The boundaries of steps in a `timeline`."""


def inert_json(data: Any) -> Markup:
    """JSON that can stand inside `<script>`: nothing in it can close the element or open a comment."""
    text = json.dumps(data, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def metric_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The charts of CHARTS for which `metrics.jsonl` has data."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = []
    for number, (title, wanted, kind) in enumerate(CHARTS):
        chosen = dict.fromkeys(name for pattern in wanted for name in names if matches(name, pattern))
        series = _distinct([s for s in (_series(lines, name) for name in chosen) if s])
        if series:
            if kind == "log" and not any(y > 0 for one in series for y in one["y"]):
                kind = ""
            unit = "" if kind == "percent" else describe(series[0]["name"])[1]
            out.append(Chart(f"chart-{number}", title, kind, unit, series))
    return out


def time_charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The chart of time use: seconds of every step by role, stacked, evaluation and checkpoint on top."""
    timed = _thin([line for line in lines if any(f"time/{role}" in line for role in ROLES)])
    steps = [line["step"] for line in timed]
    series = []
    for role in ROLES:
        values = [_short(line.get(f"time/{role}") or 0.0) for line in timed]
        if any(values):
            series.append({"name": role, "what": describe(f"time/{role}")[0], "x": steps, "y": values})
    return [Chart("chart-time", "Seconds of each step", "stack", "", series)] if series else []


def time_shares(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float, float]]:
    """Rows (role, description, seconds, fraction of the whole) over the run, largest first."""
    totals = {role: sum(line.get(f"time/{role}") or 0.0 for line in lines) for role in ROLES}
    whole = sum(totals.values())
    rows = [
        (role, describe(f"time/{role}")[0], seconds, seconds / whole) for role, seconds in totals.items() if seconds > 0
    ]
    return sorted(rows, key=lambda row: -row[2])


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
    points = _thin([line for line in lines if _is_number(line.get(name))])
    if not points:
        return None
    series: dict[str, Any] = {"name": name, "what": describe(name)[0]}
    series |= {"x": [line["step"] for line in points], "y": [_short(line[name]) for line in points]}
    if matches(name, "eval/accuracy") or matches(name, "eval/*/accuracy"):
        error = name.removesuffix("accuracy") + "standard_error"
        series["error"] = [_short(line.get(error) or 0.0) for line in points]
    return series


def _distinct(series: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The series without curves that only repeat another one (one reward of weight 1). Curves that are 0 throughout stay, since
    they may be the problem, unless a run is designed so."""
    out: list[dict[str, Any]] = []
    for one in series:
        by_design = not any(one["y"]) and any(matches(one["name"], pattern) for pattern in ZERO_BY_DESIGN)
        if not by_design and not any((one["x"], one["y"]) == (other["x"], other["y"]) for other in out):
            out.append(one)
    return out


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _thin(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    stride = max(1, math.ceil(len(lines) / POINTS_SHOWN))
    return list(lines[::-1][::stride][::-1])


def _short(value: float) -> float:
    return float(f"{value:.6g}")
