"""Log of the samples, for people, later training and `replay`: `rollouts/step-000012.parquet`, one row a sample, in batch order.

Anything that reads Parquet can read it: `pandas.read_parquet(folder)`, `load_dataset("parquet", data_dir=folder)`.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from grpo_ray.errors import DataError, first_line
from grpo_ray.files import write_whole
from grpo_ray.seeds import sample_seed
from grpo_ray.types import Group, RewardScore, Sample, SampleInfo, Score, Step, TrainBatch, TrainSample, VersionSpan

_STEPS = pa.list_(pa.struct([("end", pa.int32()), ("value", pa.float64())]))
_PART = pa.struct(
    [
        ("name", pa.string()),
        ("status", pa.string()),
        ("value", pa.float64()),
        ("detail", pa.string()),
        ("seconds", pa.float64()),
        ("steps", _STEPS),
        ("extra", pa.string()),
    ]
)
SPAN = pa.struct([("version", pa.int64()), ("start", pa.int64()), ("end", pa.int64())])

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("prompt_id", pa.string()),
        ("index", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("advantage", pa.float64()),
        ("advantage_steps", _STEPS),
        ("reward", pa.float64()),
        ("reward_status", pa.string()),
        ("rewards", pa.list_(_PART)),
        ("versions", pa.list_(SPAN)),
        ("finish_reason", pa.string()),
        ("worker", pa.string()),
        ("seed", pa.int64()),
        ("group", pa.int32()),
        ("loss_mask", pa.bool_()),
        ("part", pa.int32()),
        ("temperature", pa.float64()),
        ("top_p", pa.float64()),
        ("top_k", pa.int64()),
        ("min_p", pa.float64()),
    ]
)
"""`completion_ids` and `rollout_logprobs` are [T], `prompt_ids` [N]. A reward or advantage that is no number is null. `group`,
`loss_mask` and `part` as in `types.TrainSample`; `temperature`, `top_p`, `top_k` and `min_p` of the whole batch.

`reward` and `rewards` are the scores, before a KL is taken off; `extra` is JSON that a function logs for the sample beside its
reward, or null. `advantage` is what the learner was given: the reward itself where it computes the advantages (gae, kl_in reward);
under process the mean over the tokens, whose own are in `advantage_steps` (`end`, and the value of each token from the end before
it)."""

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
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    write_whole(path, memoryview(sink.getvalue()))
    return path


def _row(
    step: int, group: Group, info: SampleInfo, sample: Sample, score: Score, trained: TrainSample, run_seed: int
) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": sample.prompt_id,
        "index": sample.index,
        "prompt": utf8(group.prompt.text),
        "completion": utf8(sample.text),
        "prompt_ids": np.asarray(sample.prompt_token_ids, dtype=np.int32),
        "completion_ids": np.asarray(sample.token_ids, dtype=np.int32),
        "rollout_logprobs": np.asarray(sample.logprobs, dtype=np.float32),
        "advantage": _number(trained.advantage),
        "advantage_steps": _steps(trained.steps),
        "reward": _number(score.value),
        "reward_status": str(score.status),
        "rewards": [
            {
                "name": p.name,
                "status": str(p.status),
                "value": _number(p.value),
                "detail": utf8(p.detail),
                "seconds": p.seconds,
                "steps": _steps(p.steps),
                "extra": extra_json(p),
            }
            for p in score.parts
        ],
        "versions": [{"version": v.version, "start": v.start, "end": v.end} for v in sample.versions],
        "finish_reason": sample.finish_reason,
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


def read_rollouts(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of one step as plain Python; only `columns` where given.

    Raises:
        DataError: `write_rollouts` did not write the file.
    """
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in columns or () if name not in file.schema_arrow.names]:
                raise DataError(f"{path} holds no rollouts: it has no column {missing[0]!r}")
            rows: list[dict[str, Any]] = file.read(columns and list(columns)).to_pylist()
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


def _steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    return [{"end": step.end, "value": step.value} for step in steps]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def sample_of(
    row: Mapping[str, Any],
    prompt_ids: NDArray[np.int32],
    completion_ids: NDArray[np.int32],
    logprobs: NDArray[np.float32],
) -> Sample:
    """The sample of a row of a Parquet file, with its arrays as they were."""
    return Sample(
        prompt_id=row["prompt_id"],
        index=row["index"],
        prompt_token_ids=prompt_ids,
        token_ids=completion_ids,
        logprobs=logprobs,
        versions=tuple(VersionSpan(**span) for span in row["versions"]),
        finish_reason=row["finish_reason"],
        text=row["completion"],
    )


def extra_json(part: RewardScore) -> str | None:
    return utf8(json.dumps(dict(part.extra), ensure_ascii=False)) if part.extra else None


def utf8(text: str) -> str:
    """Valid UTF-8: a lone surrogate, which a model's bytes can decode to, is no valid text for Arrow."""
    return text.encode("utf-8", "replace").decode("utf-8")
