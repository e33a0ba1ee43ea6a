"""The stages that create data on this machine: chosen samples with other rows, judged pairs, prompts of several sources."""

from __future__ import annotations

from pathlib import Path

from grpo_ray.data.sources import Table
from grpo_ray.datagen.filters.config import MixConfig, PairsConfig, PromptsConfig
from grpo_ray.datagen.filters.mix import MixReport, make_mix
from grpo_ray.datagen.filters.prompts import join_prompts
from grpo_ray.datagen.filters.trace import completion_of
from grpo_ray.datagen.judged_pairs import RUBRIC
from grpo_ray.rewards.endpoints.judge_client import JudgeOptions
from grpo_ray.run.sample_files import read_samples
from launch.pipeline.judge_pairs import make_pairs


def make_data(config: MixConfig | PairsConfig | PromptsConfig, target: Path) -> MixReport:
    """Write the rows as JSONL, all or nothing."""
    match config:
        case MixConfig():
            return make_mix(config, target)
        case PromptsConfig():
            return join_prompts(config, target)
    samples = list(read_samples(Path(config.samples)))
    rows = [{"prompt": row["messages"], "completion": completion_of(row)} for row in samples]
    make_pairs(
        Table("samples", config.samples, rows),
        target,
        # After a kill and a restart, this has the judgements made before.
        JudgeOptions(**config.judge.model_dump(), cache=str(target.with_name("judge.sqlite"))),
        rubric=config.rubric or RUBRIC,
        part=config.part,
        pairs_per_prompt=config.pairs_per_prompt,
        rounds=config.rounds,
        min_margin=config.min_margin,
        length_tolerance=config.length_tolerance,
        seed=config.seed,
    )
    with target.open("rb") as file:
        num_pairs = sum(1 for _ in file)
    return MixReport(num_pairs, {"pairs": num_pairs}, {}, len(rows), 2 * num_pairs, num_contaminated=0)
