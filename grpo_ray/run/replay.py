"""Replay of a recorded step: the batch as the learner got it, the state in which the step started, and its recorded figures.

rollouts/step-000005.parquet -> TrainBatch     checkpoints/step-000004 -> learner     metrics.jsonl -> recorded figures
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_ray.errors import CheckpointError, first_line
from grpo_ray.run.rollout_log import rollout_path, rollout_steps
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.sample_columns import rows_and_samples
from grpo_ray.types import Sample, Step, TrainBatch, TrainSample, Truncation

COMPARED = ("loss/policy", "grad_norm")
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
"""The tolerance by model.dtype. The same hardware gives the same bits; other hardware sums in another order."""
_NEEDED = ("group", "loss_mask", "temperature")
_ADVICE = (
    "a step needs its rollouts/ file (tracking.rollouts) and a checkpoint of exactly the step before it; "
    "checkpoint.every_steps=1 and a checkpoint.keep as large as num_steps make every step replayable"
)


def replayable_steps(run: RunDir) -> list[int]:
    """Steps whose batch is on disk and whose initial state is known: a checkpoint, or for step 1 the starting model."""
    starts = {0, *run.steps()}
    return [step for step in rollout_steps(run.rollouts) if step - 1 in starts]


def check_replayable(run: RunDir, step: int) -> None:
    """Check that the step can be replayed. Raises CheckpointError that names what is missing, and the steps that can be."""
    possible = replayable_steps(run)
    if step in possible:
        wrong = run.first_wrong(step - 1) if step > 1 else None
        if wrong is None:
            return
        raise CheckpointError(
            f"step {step} of {run.path} can't be replayed: the checkpoint of step {step - 1} is broken: {wrong}"
        )
    has_batch = step in rollout_steps(run.rollouts)
    lacking = f"there is no checkpoint of step {step - 1}" if has_batch else f"rollouts/ has no batch of step {step}"
    raise CheckpointError(
        f"step {step} of {run.path} can't be replayed: {lacking}. Steps that can: "
        f"{', '.join(map(str, possible)) or 'none'}; {_ADVICE}"
    )


def how_to_replay(run: RunDir, step: int, *, recorded: bool) -> str:
    """A sentence on replaying, for the error of a failed step."""
    if not recorded:
        return "Its batch was not kept, since tracking.rollouts is false"
    where = f"Its batch is in {rollout_path(run.rollouts, step)}"
    command = f"`grpo-ray replay {run.path} --step {step}`"
    if step in replayable_steps(run):
        return f"{where}; {command} repeats the step"
    return f"{where}; with a checkpoint of step {step - 1} (checkpoint.every_steps=1) {command} would repeat the step"


def read_batch(path: Path, *, advantages_on_learner: bool = False) -> TrainBatch:
    """Read the batch that `rollout_log.write_rollouts` was given, its samples in one list: token for token and bit for bit.

    Args:
        advantages_on_learner: as in `AlgorithmConfig`: the file has no advantages then.

    Raises:
        CheckpointError: the file cannot be read, or was written before batches were recorded completely.
    """
    try:
        table = pq.read_table(path)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path} can't be read: {first_line(e)}") from None
    missing = [name for name in _NEEDED if name not in table.column_names]
    if missing or not table.num_rows:
        what = f"has no column {missing[0]!r}: an earlier version of grpo-ray wrote it" if missing else "is empty"
        raise CheckpointError(f"{path} {what}; the step can't be replayed")
    try:
        batch = _batch(table)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
        raise CheckpointError(f"{path} is not what a run writes ({type(e).__name__}: {e!s:.200})") from None
    if not advantages_on_learner:
        return batch
    return replace(batch, samples=[replace(s, advantage=None) for s in batch.samples])


def _batch(table: pa.Table) -> TrainBatch:
    found = rows_and_samples(table)
    rows, samples = [row for row, _ in found], [sample for _, sample in found]
    return TrainBatch(
        step=rows[0]["step"],
        samples=[_train_sample(row, samples, i) for i, row in enumerate(rows)],
        temperature=rows[0]["temperature"],
        # Files of earlier versions, whose learner knew no truncation, do not have these columns.
        truncation=Truncation(**{f.name: rows[0][f.name] for f in fields(Truncation) if f.name in rows[0]}),
    )


def parts_of(batch: TrainBatch) -> list[TrainBatch]:
    """The partial batches that the learner was given before the batch was complete, in order: another order of sums gives other
    bits."""
    numbers = sorted({s.part for s in batch.samples if s.part is not None})
    return [replace(batch, samples=[s for s in batch.samples if s.part == number]) for number in numbers]


def _train_sample(row: Mapping[str, Any], samples: list[Sample], place: int) -> TrainSample:
    sample = samples[place]
    return TrainSample(
        ref=samples,
        row=place,
        prompt_id=sample.prompt_id,
        index=sample.index,
        num_prompt_tokens=len(sample.prompt_token_ids),
        num_tokens=len(sample.token_ids),
        num_environment_tokens=len(sample.token_ids) - sample.num_sampled,
        group=row["group"],
        loss_mask=row["loss_mask"],
        reward=math.nan if row["reward"] is None else row["reward"],
        advantage=math.nan if row["advantage"] is None else row["advantage"],
        part=row.get("part"),
        # Files of earlier versions, which knew no process supervision, do not have this column.
        steps=tuple(Step(**step) for step in row.get("advantage_steps", ())),
    )


@dataclass(frozen=True)
class Comparison:
    """One figure of the step, recorded and replayed."""

    name: str
    recorded: float | None
    replayed: float
    agrees: bool

    def __str__(self) -> str:
        """One line: `grad_norm    recorded 1.25  replayed 1.25  the same bits`."""
        now = f"replayed {self.replayed:.17g}"
        if self.recorded is None:
            return f"{self.name:<12} recorded nothing  {now}"
        if self.recorded == self.replayed:
            verdict = "the same bits"
        else:
            verdict = f"difference {self.replayed - self.recorded:.3g}" + ("" if self.agrees else ", too large")
        return f"{self.name:<12} recorded {self.recorded:.17g}  {now}  {verdict}"


def compare(recorded: Mapping[str, Any], replayed: Mapping[str, float], *, tolerance: float) -> list[Comparison]:
    """Compare loss and gradient norm of a step, relative to the larger of the two values.

    The loss is a difference of terms of order one, and 0 but for rounding with one update per batch: it is also equal when
    the two differ by less than `tolerance` itself. A figure that was not recorded (the step failed) agrees with nothing.
    """
    out = []
    for name in COMPARED:
        then, now = recorded.get(name), replayed[name]
        floor = tolerance if name.startswith("loss") else 0.0
        agrees = then is not None and math.isclose(then, now, rel_tol=tolerance, abs_tol=floor)
        out.append(Comparison(name, then, now, agrees))
    return out
