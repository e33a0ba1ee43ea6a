"""`grpo-ray judge-pairs`: sampled answers -> preference pairs, by a judge model."""

from __future__ import annotations

import asyncio
from pathlib import Path

from grpo_ray.config.data import DataSource
from grpo_ray.data.decontaminate import write_jsonl
from grpo_ray.data.sources import Table, load_table, progress
from grpo_ray.datagen.judged_pairs import RUBRIC, Counts, JudgedPair, balance_lengths, judge_pairs, read_candidates
from grpo_ray.errors import ConfigError, DataError
from grpo_ray.rewards.answers.parts import Part
from grpo_ray.rewards.endpoints.judge_client import Judge, JudgeOptions
from launch.console import plain_console
from launch.interrupts import leaving

console = plain_console(soft_wrap=True)


def make_pairs(
    answers: str | Table,
    out: Path,
    options: JudgeOptions,
    *,
    rubric: str = RUBRIC,
    part: Part = "all",
    pairs_per_prompt: int = 1,
    rounds: int = 2,
    min_margin: float = 1.0,
    length_tolerance: float = 0.05,
    seed: int = 1,
) -> Path:
    """Write the pairs and return the file; print counts.

    Raises:
        ConfigError: `out` is the file to read.
        DataError: the answers can't be read, or no pair is left.
    """
    if isinstance(answers, str):
        if out.resolve() == Path(answers).resolve():
            raise ConfigError(f"--out {out} is the file to read; name another")
        answers = load_table(DataSource(path=answers), seed=seed)
    table = answers
    candidates = read_candidates(table)
    counts = Counts()

    async def ask() -> list[JudgedPair]:
        judge = Judge(options)
        with progress(f"judging {table.label}", len(candidates) * pairs_per_prompt) as advance:
            try:
                return await judge_pairs(
                    candidates,
                    judge,
                    rubric=rubric,
                    part=part,
                    pairs_per_prompt=pairs_per_prompt,
                    rounds=rounds,
                    min_margin=min_margin,
                    seed=seed,
                    counts=counts,
                    advance=advance,
                )
            finally:
                await judge.close()

    kept_answers = f"; {options.cache} has the answers until now, and the same command goes on" if options.cache else ""
    with leaving(f"{out} was not written{kept_answers}"):
        pairs = asyncio.run(ask())
    kept = balance_lengths(pairs, length_tolerance)
    console.print(f"asked    {counts.asked:,} comparisons of {len(candidates):,} prompts, {2 * rounds} judgements each")
    console.print(f"left out {counts.disagreed:,} where judgements disagree, {counts.too_close:,} too close")
    if counts.failed:
        console.print(f"failed   {counts.failed:,}; the last: {counts.last_failure}")
    if not kept:
        raise DataError(
            f"none of {counts.asked:,} comparisons made a pair, so nothing was written; lower --min-margin, or look at the judge"
        )
    console.print(
        f"left out {len(pairs) - len(kept):,} so that chosen and rejected answers are of one length on average"
    )
    write_jsonl(out, (pair.row() for pair in kept))
    console.print(f"kept     {len(kept):,} pairs in {out}, mean margin {sum(p.margin for p in kept) / len(kept):.2f}")
    return out
