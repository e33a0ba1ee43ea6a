"""Log of the samples, for people, later training and `replay`: `rollouts/step-000012.parquet`, one row a sample, in batch order.

Anything that reads Parquet can read it: `pandas.read_parquet(folder)`, `load_dataset("parquet", data_dir=folder)`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_ray.errors import DataError, first_line
from grpo_ray.files import write_whole
from grpo_ray.run.sample_columns import number, sample_cells, schema, score_cells, step_cells, table_of, utf8
from grpo_ray.seeds import sample_seed
from grpo_ray.types import Group, Sample, SampleInfo, Score, TrainBatch, TrainSample

SCHEMA = schema(
    (
        "step",
        "prompt_id",
        "index",
        "prompt",
        "completion",
        "turns",
        "prompt_ids",
        "completion_ids",
        "rollout_logprobs",
        "advantage",
        "advantage_steps",
        "reward",
        "reward_status",
        "rewards",
        "versions",
        "num_sampled",
        "finish_reason",
        "worker",
        "seed",
        "group",
        "loss_mask",
        "part",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
    )
)
"""Columns as in `sample_columns.COLUMNS`.

`advantage` is what the learner was given: the reward itself where it computes the advantages (gae, kl_in reward); under process
the mean over the tokens, whose own are in `advantage_steps` (`end`, and the value of each token from the end before it)."""

_NAME = re.compile(r"step-(\d+)\.parquet")


class ParquetRolloutLog:
    """`roles.RolloutLog` for samples that can be fetched here, written in a thread while the loop goes on."""

    def __init__(
        self, folder: Path, run_seed: int, fetch: Callable[[list[Any]], Awaitable[list[Sequence[Sample]]]]
    ) -> None:
        """Create the log; `fetch` maps handles (`SampleInfo.ref`, each once) to the lists of samples behind them, in order."""
        self._folder = folder
        self._run_seed = run_seed
        self._fetch = fetch
        self._writing: asyncio.Task[None] | None = None

    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        await self._settle()
        self._writing = asyncio.create_task(self._write(step, list(groups), batch))

    async def close(self) -> None:
        await self._settle()

    async def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def _write(self, step: int, groups: list[Group], batch: TrainBatch) -> None:
        refs = distinct_refs(groups)
        samples = await self._fetch(refs)
        await asyncio.to_thread(write_rollouts, self._folder, step, groups, batch, samples, self._run_seed)


def distinct_refs(groups: Sequence[Group]) -> list[Any]:
    """The handles of all samples, each once, in the order that `write_rollouts` expects their lists in."""
    return list({id(info.ref): info.ref for g in groups for info in g.samples}.values())


def rollout_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.parquet"


def write_rollouts(
    folder: Path,
    step: int,
    groups: Sequence[Group],
    batch: TrainBatch,
    samples: Sequence[Sequence[Sample]],
    run_seed: int,
) -> Path:
    """Write the groups of one step; the file is complete or absent.

    Args:
        batch: the batch that the learner got: all their samples, in order.
        samples: the lists behind `distinct_refs(groups)`, in that order.
    """
    lists = {id(ref): rows for ref, rows in zip(distinct_refs(groups), samples, strict=True)}
    scored = [(group, *pair) for group in groups for pair in zip(group.samples, group.scores, strict=True)]
    rows = []
    for (group, info, score), trained in zip(scored, batch.samples, strict=True):
        sample = lists[id(info.ref)][info.row]
        names = {(s.prompt_id, s.index) for s in (sample, info, trained)}
        assert len(names) == 1, f"row {info.row} is not that of {info}, or not that of {trained}"
        row = _row(step, group, info, sample, score, trained, run_seed)
        rows.append({**row, "temperature": batch.temperature, **asdict(batch.truncation)})
    folder.mkdir(parents=True, exist_ok=True)
    path = rollout_path(folder, step)
    sink = pa.BufferOutputStream()
    pq.write_table(table_of(rows, SCHEMA), sink, compression="zstd")
    write_whole(path, memoryview(sink.getvalue()))
    return path


def _row(
    step: int, group: Group, info: SampleInfo, sample: Sample, score: Score, trained: TrainSample, run_seed: int
) -> dict[str, Any]:
    return {
        **sample_cells(sample),
        **score_cells(score),
        "step": step,
        "prompt": utf8(group.prompt.text),
        "advantage": number(trained.reward if trained.advantage is None else trained.advantage),
        "advantage_steps": step_cells(trained.steps),
        "worker": info.worker,
        "seed": sample_seed(run_seed, sample.prompt_id, sample.index),
        "group": trained.group,
        "loss_mask": trained.loss_mask,
        "part": trained.part,
    }


def rollout_steps(folder: Path) -> dict[int, Path]:
    """The file of each step, in order of steps."""
    found = [(_NAME.fullmatch(p.name), p) for p in folder.glob("step-*.parquet")]
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_rollouts(
    path: Path, columns: Sequence[str] | None = None, *, also: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of one step as plain Python; only `columns` where given, and those of `also` that the file has: earlier versions
    wrote fewer.

    Raises:
        DataError: `write_rollouts` did not write the file.
    """
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in columns or () if name not in file.schema_arrow.names]:
                raise DataError(f"{path} holds no rollouts: it has no column {missing[0]!r}")
            there = [name for name in also if name in file.schema_arrow.names]
            rows: list[dict[str, Any]] = file.read(columns and [*columns, *there]).to_pylist()
            return rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path} can't be read: {first_line(e)}") from None


def remove_after(folder: Path, step: int) -> int:
    """Remove what a resumed run writes again: the steps after `step`, and unfinished files. Returns the number of steps."""
    for unfinished in folder.glob("step-*.parquet.new"):
        unfinished.unlink()
    late = [path for number, path in rollout_steps(folder).items() if number > step]
    for path in late:
        path.unlink()
    return len(late)
