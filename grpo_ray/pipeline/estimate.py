"""Estimates of a stage's tokens and time: rough, and based on the stages that are done as soon as there are some."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from grpo_ray.config.base import Strict
from grpo_ray.config.data import DataSource
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig, preferences
from grpo_ray.data.epochs import run_length
from grpo_ray.pipeline.config import AssumeConfig
from grpo_ray.pipeline.plan import Plan, Stage
from grpo_ray.pipeline.record import Record

ROWS = 10_000
"""The assumed number of rows of a data set whose size is not known yet."""


@dataclass(frozen=True)
class Estimate:
    tokens: int
    """The number of prompt and completion tokens that are sampled or trained on."""
    seconds: float | None
    """The seconds; None if neither measured nor assumed."""
    what: str
    """The amount of work, e.g. `300 steps x 32 examples`."""


def estimate(
    stage: Stage, config: Strict, plan: Plan, record: Record, num_rows: Callable[[DataSource], int | None]
) -> Estimate:
    """Estimate a stage.

    Args:
        num_rows: returns the rows of a source, as far as they can be known without reading it.
    """
    assume = plan.config.assume
    tokens, what = _work(stage, config, assume, num_rows)
    if tokens == 0:
        return Estimate(0, 0.0, what)
    speed = _measured(plan, record, stage.kind) or assume.tokens_per_s.get(stage.kind)
    return Estimate(tokens, assume.start_s + tokens / speed if speed else None, what)


def _work(
    stage: Stage, config: Strict, assume: AssumeConfig, num_rows: Callable[[DataSource], int | None]
) -> tuple[int, str]:
    if isinstance(config, SftConfig):
        length = run_length(config, num_rows(config.data.train) or ROWS)
        each = (assume.prompt_tokens or 0) + (assume.completion_tokens or config.max_length / 2)
        each *= 1 if preferences(config) is None else 2
        return round(length.num_rows * each), f"{length.num_steps:,} steps x {config.examples_per_step} examples"
    if isinstance(config, RunConfig):
        prompt = assume.prompt_tokens or config.data.max_prompt_length / 2
        each = prompt + (assume.completion_tokens or config.rollout.max_completion_length / 2)
        rows = num_rows(config.data.train) or ROWS
        if stage.kind == "train":
            length, size = run_length(config, rows), config.rollout.num_generations
            what = f"{length.num_steps:,} steps x {config.prompts_per_step} prompts x {size} samples"
            return round(length.num_rows * size * each), what
        return round(rows * config.sample.num_samples * each), f"{rows:,} prompts x {config.sample.num_samples} samples"
    return 0, "on this machine"


def _measured(plan: Plan, record: Record, kind: str) -> float | None:
    """The tokens per second of the finished stages of this kind, start-up aside."""
    costs = [record.stages[s.name].cost for s in plan.stages if s.kind == kind and record.done(s.name)]
    seconds = sum(max(1.0, c.seconds - c.starts * plan.config.assume.start_s) for c in costs)
    tokens = sum(c.tokens for c in costs)
    return tokens / seconds if tokens else None


def rows_known(source: DataSource, rows_of: Mapping[str, int]) -> int | None:
    """The rows of a generator by its `args`, of a stage's data by its output; None where the file would have to be read."""
    size = source.args.get("size")
    found = rows_of.get(source.path) or (int(size) if size is not None else None)
    if found is None and source.path.endswith(".jsonl") and Path(source.path).is_file():
        with Path(source.path).open("rb") as file:
            found = sum(1 for line in file if line.strip())
    limits = [n for n in (found, source.limit) if n is not None]
    return min(limits) if limits else None
