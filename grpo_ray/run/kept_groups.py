"""Groups of a checkpoint that are sampled and scored but not trained, so that a resumed run samples only the missing ones.

`loop/groups.parquet`, one row a sample: everything of a group but its prompt, which the cursor provides again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_ray import json_text
from grpo_ray.errors import CheckpointError
from grpo_ray.run.rollout_log import distinct_refs
from grpo_ray.run.run_dir import LOOP
from grpo_ray.run.sample_columns import rows_and_samples, sample_cells, schema, table_of
from grpo_ray.types import Group, LoggedMetric, RewardScore, Sample, SampleInfo, Score, ScoreStatus, Step

KEPT_GROUPS = f"{LOOP}/groups.parquet"
_SCHEMA = schema(
    (
        "order",
        "dispatched_version",
        "prompt_id",
        "index",
        "prompt_ids",
        "completion_ids",
        "rollout_logprobs",
        "versions",
        "min_version",
        "finish_reason",
        "completion",
        "turns",
        "worker",
        "score",
    )
)
"""Columns as in `sample_columns.COLUMNS`."""


@dataclass(frozen=True)
class KeptGroup:
    """One group of a checkpoint."""

    order: int
    dispatched_version: int
    prompt_id: str
    samples: list[Sample]
    min_versions: list[int | None]
    """As in `SampleInfo`."""
    workers: list[str]
    scores: list[Score]

    def infos(self, ref: Any) -> list[SampleInfo]:
        """The records of its samples for the loop, with their tokens behind `ref`."""
        return [
            SampleInfo(
                prompt_id=s.prompt_id,
                index=s.index,
                num_prompt_tokens=len(s.prompt_token_ids),
                num_tokens=len(s.token_ids),
                min_version=version,
                finish_reason=s.finish_reason,
                worker=worker,
                ref=ref,
                row=row,
                num_environment_tokens=len(s.token_ids) - s.num_sampled,
            )
            for row, (s, version, worker) in enumerate(zip(self.samples, self.min_versions, self.workers, strict=True))
        ]


def write_groups(path: Path, groups: Sequence[Group], lists: Sequence[Sequence[Sample]]) -> None:
    """Write the groups. `lists` are those behind `distinct_refs(groups)`, in that order."""
    behind = {id(ref): rows for ref, rows in zip(distinct_refs(groups), lists, strict=True)}
    rows = [
        _row(group, info, behind[id(info.ref)][info.row], score)
        for group in groups
        for info, score in zip(group.samples, group.scores, strict=True)
    ]
    pq.write_table(table_of(rows, _SCHEMA), path, compression="zstd")


def read_groups(path: Path) -> list[KeptGroup]:
    """Read what `write_groups` wrote, bit for bit, in dispatch order.

    Raises:
        CheckpointError: the file is something else.
    """
    try:
        return _groups(pq.read_table(path))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is not what a run writes ({type(e).__name__}: {e!s:.200})") from None


def _groups(table: pa.Table) -> list[KeptGroup]:
    by_order: dict[int, list[tuple[dict[str, Any], Sample]]] = {}
    for row, sample in rows_and_samples(table):
        by_order.setdefault(row["order"], []).append((row, sample))
    return [_group(order, members) for order, members in sorted(by_order.items())]


def _group(order: int, members: list[tuple[dict[str, Any], Sample]]) -> KeptGroup:
    rows = [row for row, _ in members]
    return KeptGroup(
        order=order,
        dispatched_version=rows[0]["dispatched_version"],
        prompt_id=rows[0]["prompt_id"],
        samples=[sample for _, sample in members],
        min_versions=[row["min_version"] for row in rows],
        workers=[row["worker"] for row in rows],
        scores=[_score(json_text.read(row["score"])) for row in rows],
    )


def _row(group: Group, info: SampleInfo, sample: Sample, score: Score) -> dict[str, Any]:
    return {
        **sample_cells(sample),
        "order": group.order,
        "dispatched_version": group.dispatched_version,
        "min_version": info.min_version,
        "worker": info.worker,
        "score": json.dumps(asdict(score)),
    }


def _score(saved: Mapping[str, Any]) -> Score:
    parts = tuple(
        RewardScore(
            **{
                **part,
                "status": ScoreStatus(part["status"]),
                "steps": _steps(part["steps"]),
                "extra": tuple((column, value) for column, value in part.get("extra", ())),
                "logged": tuple(LoggedMetric(*figures) for figures in part.get("logged", ())),
            }
        )
        for part in saved["parts"]
    )
    status, steps = ScoreStatus(saved["status"]), _steps(saved["steps"])
    return Score(status, saved["value"], parts, saved["detail"], steps)


def _steps(saved: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    return tuple(Step(**step) for step in saved)
