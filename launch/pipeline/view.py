"""The output of `grpo-ray pipeline`: the plan before, the figures after."""

from __future__ import annotations

from rich.measure import Measurement
from rich.table import Table

from grpo_ray.config.data import DataSource
from grpo_ray.pipeline.estimate import Estimate, estimate, rows_known
from grpo_ray.pipeline.plan import Plan, Stage
from grpo_ray.pipeline.record import Record
from grpo_ray.pipeline.report import held_out_figures
from grpo_ray.telemetry.metrics import duration
from launch.console import plain_console

console = plain_console(soft_wrap=True)
MAX_WIDTH = 240


def print_figures(plan: Plan, record: Record) -> None:
    """Print the figures on the held-out prompts, after each stage."""
    head, rows = held_out_figures(plan, record, brief=True)
    if not head:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("held out", no_wrap=True)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in rows:
        table.add_row(name, *values)
    console.print()
    # Unwrapped, also where the output is a file or a narrow terminal.
    whole = Measurement.get(console, console.options.update(max_width=MAX_WIDTH), table).maximum
    plain_console(width=max(console.width, whole)).print(table)


def print_plan(plan: Plan, record: Record, todo: list[Stage]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("stage", "kind", "needs", "work"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    rows_of = dict(plan.config.assume.rows)
    for stage in (s for s in plan.stages if "data" in s.spec.outputs):
        known = (
            record.stages[stage.name].metrics.get("num_rows") if record.done(stage.name) else rows_of.get(stage.name)
        )
        if known is not None:
            rows_of[str(plan.output(stage.name, "data"))] = int(known)

    def num_rows(source: DataSource) -> int | None:
        return rows_known(source, rows_of)

    guesses: list[Estimate] = []
    for stage in plan.stages:
        name, needs = stage.name, ", ".join(stage.needs)
        if stage in todo:
            guess = estimate(stage, plan.config_of(stage), plan, record, num_rows)
            guesses.append(guess)
            time_left = "?" if guess.seconds is None else duration(guess.seconds)
            table.add_row(name, stage.kind, needs, guess.what, f"{guess.tokens:,}", time_left)
        elif record.done(name):
            cost = record.stages[name].cost
            table.add_row(name, stage.kind, needs, "done", f"{cost.tokens:,}", duration(cost.seconds), style="dim")
        else:
            table.add_row(name, stage.kind, needs, "later", "", "", style="dim")
    console.print(table)
    seconds = sum(g.seconds or 0.0 for g in guesses)
    unknown = sum(g.seconds is None for g in guesses)
    about = f"about {duration(seconds)}" + (f" and {unknown} stages of unknown time" if unknown else "")
    console.print(f"to run   {len(todo)} stages, about {sum(g.tokens for g in guesses):,} tokens, {about}")
