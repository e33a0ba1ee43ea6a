"""The report.html of a pipeline: metrics of the model after each stage, the same prompts after every stage, the composition of the
data, the use of time and tokens. It is one self-contained file, in which text of models is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from grpo_ray.files import write_whole
from grpo_ray.pipeline.gates import figures_of, judge
from grpo_ray.pipeline.plan import Plan, Stage
from grpo_ray.pipeline.record import Record
from grpo_ray.report.charts import Chart, inert_json
from grpo_ray.run.sample_files import read_samples
from grpo_ray.telemetry.metrics import duration

PERCENT = ("accuracy", "cut_off", "not_applicable", "failed")
TEXT_LIMIT = 4000


def write_pipeline_report(plan: Plan, record: Record) -> Path:
    """Write `report.html` of the stages done so far into the pipeline's folder."""
    measured = _measured(plan, record)
    head, table = held_out_figures(plan, record)
    charts = _charts(measured, record)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    here = files("grpo_ray")
    # The style of a run's report, and its drawing script.
    of_a_run = (here / "report" / "template.html").read_text()
    page = environment.from_string((here / "pipeline" / "report_template.html").read_text()).render(
        style=Markup(of_a_run.partition("<style>")[2].partition("</style>")[0]),
        drawing=Markup(of_a_run.rpartition("<script>")[2].partition("</script>")[0]),
        title=plan.name,
        subtitle=f"{sum(record.done(s.name) for s in plan.stages)} of {len(plan.stages)} stages are done",
        head=head,
        table=table,
        charts=charts,
        data=inert_json([asdict(c) for c in charts]),
        plotly=Markup(get_plotlyjs() if charts else ""),
        stages=[_stage(s, plan, record) for s in plan.stages],
        total=_total(record),
        mixes=[_mix(s, record) for s in plan.stages if "data" in s.spec.outputs and record.done(s.name)],
        prompts=_same_prompts(measured, plan),
        recipe=yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )
    path = plan.folder / "report.html"
    write_whole(path, page.encode("utf-8", errors="replace"))
    return path


def _measured(plan: Plan, record: Record) -> list[Stage]:
    return [s for s in plan.stages if s.measures and record.done(s.name)]


def held_out_figures(
    plan: Plan, record: Record, *, brief: bool = False
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The stages that made a model, and rows of (metric, its value after each).

    With `brief` only accuracy is split by kinds of prompts.
    """
    measured = _measured(plan, record)
    names = dict.fromkeys(n for s in measured for n in record.stages[s.name].metrics if n != "accuracy_error")
    if brief:
        names = dict.fromkeys(n for n in names if n.count("/") == n.startswith("reward/") or n.startswith("accuracy/"))
    rows = [(name, [_shown(name, record.stages[s.name].metrics) for s in measured]) for name in names]
    return [s.measures or s.name for s in measured], rows


def _shown(name: str, metrics: Mapping[str, float]) -> str:
    value = metrics.get(name)
    if value is None:
        return ""
    if name == "accuracy":
        return f"{value:.1%} ± {100 * metrics.get('accuracy_error', 0.0):.1f}"
    if name.split("/")[0] in PERCENT:
        return f"{value:.1%}"
    return f"{value:.1f}" if name.startswith("length") else f"{value:.3f}"


def _charts(measured: Sequence[Stage], record: Record) -> list[Chart]:
    """Charts of accuracy by kind of prompt, rewards and length over the stages."""
    names = list(dict.fromkeys(n for s in measured for n in record.stages[s.name].metrics))
    wanted = (
        ("Accuracy", [n for n in names if n.split("/")[0] == "accuracy"], "percent"),
        ("Rewards", [n for n in names if n.startswith("reward/") and n.count("/") == 1], ""),
        ("Tokens of an answer", [n for n in names if n == "length" or n.startswith("length/")], ""),
    )
    stages = [s.measures or s.name for s in measured]
    out = []
    for number, (title, chosen, kind) in enumerate(wanted):
        series = [
            {"name": n, "what": n, "x": stages, "y": [record.stages[s.name].metrics.get(n) for s in measured]}
            for n in chosen
        ]
        if series and len(stages) > 1:
            out.append(Chart(f"chart-{number}", title, kind, "", series))
    return out


def _stage(stage: Stage, plan: Plan, record: Record) -> dict[str, Any]:
    entry = record.stages.get(stage.name)
    gates: list[tuple[str, bool]] = []
    if entry is not None and entry.done:
        figures = figures_of(plan, record)
        gates = [(v.text, v.passed) for v in judge(stage.gates, figures[stage.name], figures)]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "note": stage.note,
        "state": "to come" if entry is None else "done" if entry.done else "begun",
        "time": duration(entry.cost.seconds) if entry else "",
        "tokens": f"{entry.cost.tokens:,}" if entry else "",
        "starts": entry.cost.starts if entry else 0,
        "gates": gates,
    }


def _total(record: Record) -> tuple[str, str]:
    costs = [entry.cost for entry in record.stages.values()]
    return duration(sum(c.seconds for c in costs)), f"{sum(c.tokens for c in costs):,}"


def _mix(stage: Stage, record: Record) -> dict[str, Any]:
    details = record.stages[stage.name].details
    rows = details["num_rows"]
    return {
        "name": stage.name,
        "num_rows": rows,
        "num_samples": details["num_samples"],
        "num_chosen": details["num_chosen"],
        "num_contaminated": details["num_contaminated"],
        "composition": [(kind, n, f"{n / rows:.0%}") for kind, n in details["composition"].items()],
        "left_out": list(details["left_out"].items()),
    }


def _same_prompts(measured: Sequence[Stage], plan: Plan) -> list[dict[str, Any]]:
    """The first answer to the same held-out prompts after every stage; as many kinds of prompts as there are."""
    answers: dict[str, dict[str, dict[str, Any]]] = {}
    for stage in measured:
        for row in read_samples(plan.output(stage.name, "samples")):
            if row["index"] == 0:
                answers.setdefault(row["prompt_id"], {})[stage.measures or stage.name] = row
    by = plan.config.eval_by
    kinds: dict[str, list[str]] = {}
    for prompt_id, rows in answers.items():
        columns = next(iter(rows.values()))["columns"]
        kinds.setdefault(f"{columns.get(by)}/{columns.get('language')}" if by else "", []).append(prompt_id)
    turns = [ids[i] for i in range(plan.config.samples_shown) for ids in kinds.values() if i < len(ids)]
    return [_answers(answers[prompt_id]) for prompt_id in turns[: plan.config.samples_shown]]


def _answers(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    first = next(iter(rows.values()))
    return {
        "id": first["prompt_id"],
        "prompt": "\n".join(str(m["content"]) for m in first["messages"])[:TEXT_LIMIT],
        "answers": [
            {
                "stage": stage,
                "text": row["completion"][:TEXT_LIMIT],
                "scores": [(p["name"], "" if p["value"] is None else f"{p['value']:.2f}") for p in row["rewards"]],
                "facts": f"{len(row['completion_ids'])} tokens"
                + ("" if row["finish_reason"] == "stop" else ", cut at the limit"),
            }
            for stage, row in rows.items()
        ],
    }
