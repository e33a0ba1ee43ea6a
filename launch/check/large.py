"""The lines of `check` on large data sets: what is counted over all rows, and what is estimated from a sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.prompts import PromptSets
from grpo_ray.data.templates import Render
from grpo_ray.data.tokenized import LoadReport, tokenized_rows
from grpo_ray.rewards.columns import ColumnFacts
from launch.check.overview import Overview, Sampler, key_of


def of_all_rows(report: LoadReport, overview: Overview | None, num_in_eval: int | None = None) -> LoadReport:
    """The report of all rows, estimated from that of a sample.

    Args:
        report: the report of the sample.
        overview: None: the report is of all rows.
        num_in_eval: the rows also in `data.eval`, where known.
    """
    if overview is None:
        return report
    in_eval = overview.scaled(report.num_in_eval) if num_in_eval is None else num_in_eval
    too_long = min(overview.scaled(report.num_too_long), overview.num_rows - in_eval)
    return LoadReport(overview.num_rows, too_long, in_eval)


def overview_rows(config: RunConfig | SftConfig, sampler: Sampler) -> Iterator[tuple[str, str]]:
    """A line for each data set that was sampled, and for prompts that appear more than once."""
    sources = {"data.train": config.data.train} | {
        f"data.eval {n}".strip(): s for n, s in config.data.eval_sets.items()
    }
    for option, source in sources.items():
        overview = sampler.overviews.get(key_of(source))
        if overview is None:
            continue
        yield (
            "sample",
            f"{option}: {overview.num_looked_at:,} of {overview.num_rows:,} rows were templated and tokenized, so what is said of "
            "lengths is an estimate; columns are counted over all rows",
        )
        if overview.num_repeated:
            yield (
                "repeated",
                f"{option}: {overview.num_repeated:,} of {overview.num_rows:,} rows have the prompt of an earlier one",
            )


def facts_of(config: RunConfig, sampler: Sampler) -> dict[str, ColumnFacts]:
    """Option -> the columns of all rows, for data sets that were sampled."""
    sources = {"data.train": config.data.train} | {
        f"data.eval.{n}" if n else "data.eval": s for n, s in config.data.eval_sets.items()
    }
    found = {option: sampler.overviews.get(key_of(source)) for option, source in sources.items()}
    return {option: overview.facts for option, overview in found.items() if overview is not None}


def num_in_eval(config: RunConfig, sampler: Sampler, prompts: PromptSets) -> int | None:
    """The training rows whose prompt is held out; None: it is to be estimated, or nothing is held out."""
    overview = sampler.overviews.get(key_of(config.data.train))
    sampled = any(key_of(source) in sampler.overviews for source in config.data.eval_sets.values())
    if overview is None or sampled or not config.data.exclude_eval:
        return None
    return overview.num_in(prompt.asked for held_out in prompts.eval.values() for prompt in held_out)


def longest_prompt(config: RunConfig, sampler: Sampler, render: Render, tokenizer: Any, limit: int, known: int) -> int:
    """The tokens of the longest prompt that is kept, as far as the sample and the rows with the longest texts show.

    Args:
        config: the config with the data.
        sampler: the sampler that has read them.
        render: renders the template.
        tokenizer: the tokenizer of the model.
        limit: the most tokens of a prompt that is kept.
        known: the tokens of the longest prompt in the sample.
    """
    overview = sampler.overviews.get(key_of(config.data.train))
    if overview is None or not overview.longest.rows:
        return known
    rows = tokenized_rows(overview.longest, config.data.train, render, tokenizer, demonstrations=False)
    return max([known, *(n for row in rows if (n := len(row.token_ids)) <= limit)])
