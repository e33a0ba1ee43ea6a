"""The page report.html of a run, one self-contained file: curves, time use, samples to read.

Nothing in it comes from the network: plotly's JavaScript is included (4.8 MB of the file). Data is inert JSON, and text of models
and data sets is escaped by Jinja.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from grpo_ray.config.yaml import dump_yaml, load_yaml
from grpo_ray.errors import DataError, GrpoRayError
from grpo_ray.files import write_whole
from grpo_ray.plain_terminal import clean
from grpo_ray.report.charts import inert_json, metric_charts, time_charts, time_shares
from grpo_ray.report.episodes import Turn, turns_of
from grpo_ray.report.timeline import busy_table, timeline_chart
from grpo_ray.run.rollout_log import read_rollouts, rollout_steps
from grpo_ray.telemetry.advice import advise, mean_step
from grpo_ray.telemetry.catalogue import LOSSES, describe
from grpo_ray.telemetry.messages import Message, read_messages, told_once
from grpo_ray.telemetry.metrics import duration
from grpo_ray.telemetry.tracking import read_metrics

SAMPLE_COLUMNS = (
    "prompt_id",
    "index",
    "prompt",
    "completion",
    "completion_ids",
    "advantage",
    "reward",
    "reward_status",
    "rewards",
    "versions",
    "finish_reason",
    "worker",
)
GROUPS_SHOWN = 2
"""The number of groups of each step shown: those with the widest spread of rewards, from which something was learned."""
NOTHING = "n/a"
MESSAGES_SHOWN = 100
_ENDED = {"length": "cut at the limit", "stop": "ended by itself"}
TEXT_LIMIT = 20_000
"""The most characters of one text in the report; the Parquet file has the whole."""


@dataclass(frozen=True)
class Figure:
    """One headline number."""

    label: str
    value: str
    note: str = ""


def write_report(run_dir: Path, ledger: Mapping[str, Any] | None = None) -> Path:
    """Write `run_dir/report.html` from the files that the run has left: config.yaml, metrics.jsonl, rollouts/, trace.json,
    messages.jsonl.

    Args:
        ledger: figures to show as they are, e.g. `asdict(Ledger(...).summary())`.

    Raises:
        ConfigError, DataError: the files are not those of a run.
    """
    try:
        page = _page(run_dir, ledger or {})
    except (TypeError, AttributeError, KeyError, IndexError, ValueError, ArithmeticError) as e:
        if isinstance(e, GrpoRayError):
            raise
        raise DataError(f"{run_dir}: its files are not what a run writes ({type(e).__name__}: {e!s:.200})") from e
    path = run_dir / "report.html"
    write_whole(path, page.encode("utf-8", errors="replace"))
    return path


def _page(run_dir: Path, ledger: Mapping[str, Any]) -> str:
    config = load_yaml(run_dir / "config.yaml") if (run_dir / "config.yaml").exists() else {}
    lines = read_metrics(run_dir / "metrics.jsonl")
    steps = rollout_steps(run_dir / "rollouts")
    curves, timings = metric_charts(lines), time_charts(lines)
    timeline = timeline_chart(run_dir / "trace.json")
    charts = [*curves, *timings, *([timeline] if timeline else [])]
    times = mean_step(lines, config)
    # Advice on speed does not help a run that does not learn.
    learns = not (lines and lines[-1].get("steps/without_signal"))
    advice = advise(times) if times and learns else None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_without_controls
    )
    return environment.from_string((files("grpo_ray") / "report" / "template.html").read_text()).render(
        title=config.get("name") or run_dir.resolve().name,
        subtitle=_subtitle(config),
        figures=_headlines(lines, config),
        messages=_messages(read_messages(run_dir)),
        curves=curves,
        timings=timings,
        timeline=timeline,
        timeline_height=60 + 24 * len(timeline.rows) if timeline else 0,
        busy=[(role, n, f"{busy:.0%}", f"{idle:.0%}") for role, n, busy, idle in busy_table(lines)],
        advice=advice.text if advice else "",
        shares=[(role, what, duration(s), f"{part:.0%}") for role, what, s, part in time_shares(lines)],
        data=inert_json([asdict(c) for c in charts]),
        plotly=Markup(get_plotlyjs() if charts else ""),
        sampled=[_step_samples(step, steps[step]) for step in first_middle_last(list(steps))],
        ledger=_flat_ledger(ledger),
        config=dump_yaml(config) if config else "",
        failures=_failures(lines),
    )


def _without_controls(value: Any) -> Any:
    """What the page shows of a value; `Markup` is our own."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def first_middle_last(steps: Sequence[int]) -> list[int]:
    """The first, middle and last step, each once, in order; the middle is the step nearest to half-way."""
    if not steps:
        return []
    half = (steps[0] + steps[-1]) / 2
    return sorted({steps[0], min(steps, key=lambda step: abs(step - half)), steps[-1]})


def _subtitle(config: Mapping[str, Any]) -> str:
    model = config.get("model") or {}
    tiny = model.get("tiny")
    name = model.get("path") or (f"tiny model, {tiny['num_layers']} layers of {tiny['hidden_size']}" if tiny else None)
    data = ((config.get("data") or {}).get("train") or {}).get("path")
    return " · ".join(str(part) for part in (name, data) if part)


# Headline figures


def _headlines(lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> list[Figure]:
    trained = [line for line in lines if line["step"] > 0 and "time/step" in line]
    out: list[Figure] = []
    names = {name: None for line in lines for name in line if name.startswith("eval/") and name.endswith("/accuracy")}
    out += [_accuracy(lines, name) for name in names if any(line.get(name) is not None for line in lines)]
    if not out and (rewards := [line["reward/mean"] for line in trained if line.get("reward/mean") is not None]):
        out.append(Figure("Reward", f"{rewards[0]:.3f} → {rewards[-1]:.3f}", "first and last step"))
    losses = [line[k] for line in trained for k in LOSSES if line.get(k) is not None]
    if losses:
        out.append(Figure("Loss", f"{losses[0]:.3f} → {losses[-1]:.3f}", "first and last step"))
    planned = config.get("num_steps")
    last_step = lines[-1]["step"] if lines else 0
    out.append(Figure("Steps", f"{last_step:,}", f"of {planned:,} planned" if planned and planned != last_step else ""))
    samples = sum(_samples_of(line) for line in trained)
    if samples:
        out.append(Figure("Samples", f"{samples:,.0f}", f"{samples / len(trained):,.0f} a step"))
    total = sum(line.get(f"time/{part}") or 0.0 for line in lines for part in ("step", "eval", "checkpoint"))
    if total:
        per_step = sum(line["time/step"] or 0.0 for line in trained) / max(1, len(trained))
        out.append(Figure("Time", duration(total), f"{per_step:.2f} s a step" if trained else ""))
    tokens = sum((line.get("throughput/tokens_per_s") or 0.0) * (line["time/step"] or 0.0) for line in trained)
    in_steps = sum(line["time/step"] or 0.0 for line in trained)
    if tokens and in_steps:
        out.append(
            Figure("Tokens per second", f"{tokens / in_steps:,.0f}", f"{tokens:,.0f} tokens, whole step counted")
        )
    return out


def _accuracy(lines: Sequence[Mapping[str, Any]], name: str) -> Figure:
    """The accuracy of one evaluation set: `eval/accuracy`, or `eval/NAME/accuracy`."""
    evals = [line for line in lines if line.get(name) is not None]
    first, last = evals[0], evals[-1]
    error = last.get(name.removesuffix("accuracy") + "standard_error")
    note = f"step {first['step']} → {last['step']}" + (f", last ± {100 * error:.1f}" if error is not None else "")
    aside = last.get(name.removesuffix("accuracy") + "not_applicable")
    note += f", {aside:.0f} samples not applicable" if aside else ""
    value = f"{first[name]:.1%} → {last[name]:.1%}" if len(evals) > 1 else f"{last[name]:.1%}"
    of = name.removeprefix("eval/").removesuffix("accuracy").strip("/")
    return Figure(f"Held-out accuracy, {of}" if of else "Held-out accuracy", value, note)


def _samples_of(line: Mapping[str, Any]) -> float:
    return round((line.get("throughput/samples_per_s") or 0.0) * (line.get("time/step") or 0.0))


def _messages(messages: Sequence[Message]) -> list[tuple[str, str, str]]:
    """Messages as (when, level, text), each text once; of very many the last."""
    return [
        (f"step {m.step}" + (f", {count} times" if count > 1 else ""), m.level, _shorten(m.text))
        for m, count in told_once(messages)[-MESSAGES_SHOWN:]
    ]


def _failures(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Failed scores and dropped groups of the whole run, by name."""
    totals: dict[str, float] = {}
    for line in lines:
        for name, value in line.items():
            counts = name.startswith("groups/dropped/") or (name.startswith("reward/") and name.endswith("/failed"))
            if counts and value:
                totals[describe(name)[0]] = totals.get(describe(name)[0], 0.0) + value
    return list(totals.items())


def _flat_ledger(ledger: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in ledger.items():
        label = f"{prefix}{key.replace('_', ' ')}"
        out += _flat_ledger(value, f"{label}: ") if isinstance(value, Mapping) else [(label, value)]
    return out


# Samples


def _step_samples(step: int, path: Path) -> dict[str, Any]:
    rows = read_rollouts(path, SAMPLE_COLUMNS, also=("turns",))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    widest = sorted(groups.values(), key=_spread, reverse=True)[:GROUPS_SHOWN]
    return {"step": step, "num_groups": len(groups), "num_samples": len(rows), "groups": [_group(g) for g in widest]}


def _spread(rows: Sequence[Mapping[str, Any]]) -> float:
    values = [row["reward"] for row in rows if row["reward"] is not None]
    return max(values) - min(values) if values else -1.0


def _group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The best and the worst sample of a group; a sample whose score failed is neither, unless all failed."""
    scored = [row for row in rows if row["reward"] is not None] or list(rows)
    best = max(scored, key=_worth)
    worst = min(scored, key=_worth)
    picked = [("best", best)] if best is worst else [("best", best), ("worst", worst)]
    rewards = [f"{row['reward']:.2f}" if row["reward"] is not None else NOTHING for row in rows]
    return {
        "prompt_id": rows[0]["prompt_id"],
        "prompt": _shorten(rows[0]["prompt"]),
        "rewards": rewards,
        "samples": [_sample(label, row) for label, row in picked],
    }


def _worth(row: Mapping[str, Any]) -> float:
    return row["reward"] if row["reward"] is not None else 0.0


def _sample(label: str, row: Mapping[str, Any]) -> dict[str, Any]:
    versions = sorted({span["version"] for span in row["versions"]})
    return {
        "label": label,
        "completion": _shorten(row["completion"]),
        "turns": [_turn(turn) for turn in turns_of(row)],
        "reward": _signed(row["reward"], sign=False) if row["reward"] is not None else row["reward_status"],
        "advantage": _signed(row["advantage"], sign=True),
        "scores": [
            (
                part["name"],
                _signed(part["value"], sign=False) if part["value"] is not None else part["status"],
                part["detail"],
            )
            for part in row["rewards"]
        ],
        "facts": [
            _length(row),
            _ENDED.get(row["finish_reason"], row["finish_reason"].replace("_", " ")),
            f"policy {', '.join(map(str, versions))}",
            f"sample {row['index']} by {row['worker']}",
        ],
    }


def _turn(turn: Turn) -> dict[str, Any]:
    rewards = [(name, _signed(value, sign=False)) for name, value in turn.rewards]
    return {"who": turn.who, "by_model": turn.by_model, "text": _shorten(turn.text), "rewards": rewards}


def _length(row: Mapping[str, Any]) -> str:
    total = len(row["completion_ids"])
    sampled = sum(span["end"] - span["start"] for span in row["versions"])
    return f"{total} tokens" if sampled == total else f"{total} tokens, {sampled} of them the model's"


def _signed(value: float | None, *, sign: bool) -> str:
    if value is None:
        return NOTHING
    return f"{value:+.3f}" if sign else f"{value:.3f}"


def _shorten(text: str) -> str:
    return text if len(text) <= TEXT_LIMIT else f"{text[:TEXT_LIMIT]}\n… {len(text) - TEXT_LIMIT:,} more characters"
