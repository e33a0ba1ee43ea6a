"""Selection of the samples of each prompt that are kept, and their output form."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from grpo_ray.data.templates import KWARGS, TOOLS
from grpo_ray.datagen.filters.config import SampledSource
from grpo_ray.datagen.filters.trace import completion_of, first_fault, num_sampled_of, trace_of
from grpo_ray.errors import DataError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.answers.parts import part_of

Row = dict[str, Any]


@dataclass
class Selection:
    """The selection from the samples of one source."""

    rows: list[Row] = field(default_factory=list)
    """The kept rows in TRL's conversational form: prompt, completion, and their origin."""
    left_out: Counter[str] = field(default_factory=Counter)
    """The number of samples left out, by reason."""
    num_samples: int = 0
    num_prompts: int = 0

    @property
    def num_kept(self) -> int:
        return len(self.rows)


def select(samples: Iterable[Row], config: SampledSource, *, seed: int) -> Selection:
    """Filter samples, drop duplicates, and keep so many of each prompt.

    Args:
        samples: rows of `read_samples`, in which those of a prompt are neighbours.
        seed: the seed of `prefer: random`.
    """
    out = Selection()
    for prompt_id, group in groupby(samples, key=lambda row: row["prompt_id"]):
        rows = [r for r in group if all(str(r["columns"].get(k)) == v for k, v in config.only.items())]
        if not rows:
            continue
        out.num_prompts += 1
        out.num_samples += len(rows)
        passed = []
        for row in rows:
            fault = first_fault(trace_of(row), config.filter)
            if fault is None:
                passed.append(row)
            else:
                out.left_out[fault] += 1
        distinct = _without_duplicates(passed)
        chosen = _keep(distinct, config, random.Random(f"{seed}/{prompt_id}"))
        out.left_out["duplicate"] += len(passed) - len(distinct)
        out.left_out["more of the same prompt"] += len(distinct) - len(chosen)
        out.rows += [_demonstration(row, config) for row in chosen]
    out.left_out = +out.left_out
    return out


def _without_duplicates(rows: list[Row]) -> list[Row]:
    """The rows without duplicates, apart from white space; the first stays."""
    return list({" ".join(row["completion"].split()): row for row in reversed(rows)}.values())[::-1]


def _keep(rows: list[Row], config: SampledSource, rng: random.Random) -> list[Row]:
    match config.prefer:
        case "shortest":
            rows = sorted(rows, key=num_sampled_of)
        case "random":
            rows = rng.sample(rows, len(rows))
    return rows[: config.keep_per_prompt]


def _demonstration(row: Row, config: SampledSource) -> Row:
    return {
        "prompt": row["messages"],
        "completion": [{"role": "assistant", "content": written(completion_of(row), row["columns"], config.summary)}],
        "source": "samples",
        "prompt_id": row["prompt_id"],
        "index": row["index"],
        "model_sha256": row["model_sha256"],
        "columns": row["columns"],
        # The chat template has to get for the demonstration what it got for the prompt.
        **{name: row["columns"][name] for name in (TOOLS, KWARGS) if row["columns"].get(name) is not None},
    }


def written(completion: str, columns: Row, summary: str | dict[str, str] | None) -> str:
    """The completion with its reasoning unchanged, followed by the summary.

    Raises:
        DataError: there is no summary for the row's language.
    """
    if summary is None:
        return completion
    if isinstance(summary, dict):
        language = str(columns.get("language"))
        if language not in summary:
            raise DataError(f"summary has none for language {language!r} of a row; it has: {', '.join(summary)}")
        summary = summary[language]
    return f"<think>{part_of(completion, 'reasoning')}</think>{summary.replace('{answer}', answer_of(completion))}"
