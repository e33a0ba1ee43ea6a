"""Prompts of several sources, joined for a run whose rewards depend on the source: rules for reasoning, models for everything
else."""

from __future__ import annotations

import random
from pathlib import Path

from grpo_ray.data.decontaminate import write_jsonl
from grpo_ray.data.sources import load_table, map_columns
from grpo_ray.datagen.filters.config import PromptsConfig
from grpo_ray.datagen.filters.mix import MixReport


def join_prompts(config: PromptsConfig, target: Path) -> MixReport:
    """Write the rows as JSONL, all or nothing, in an order that `config.seed` decides."""
    rows = []
    composition = {}
    for name, source in config.sources.items():
        table = load_table(source, seed=config.seed)
        rows += [
            {**map_columns(row, source.columns, table.where(i)), "source": name} for i, row in enumerate(table.rows)
        ]
        composition[name] = len(table.rows)
    random.Random(config.seed).shuffle(rows)
    write_jsonl(target, rows)
    return MixReport(len(rows), composition, {}, num_samples=0, num_chosen=0, num_contaminated=0)
