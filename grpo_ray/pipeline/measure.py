"""Metrics of a model on the held-out prompts, from samples with their scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from grpo_ray.telemetry.measures import estimate
from grpo_ray.types import ScoreStatus

Row = dict[str, Any]
FAILED = tuple(status for status in ScoreStatus if status.failed)


def measure(rows: Iterable[Row], *, accuracy: str, threshold: float, by: str | None) -> dict[str, float]:
    """Compute the metrics.

    Args:
        rows: rows of `read_samples`.
        accuracy: the reward function that decides what is right; prompts to which it does not apply have no part in accuracy.
        threshold: its least value for a right sample.
        by: the column with the kind of prompt.

    Returns:
        `accuracy` and `accuracy/KIND` (mean over prompts of the fraction of right samples), `accuracy_error` (its standard error),
        `reward/NAME` (mean of each function where it applies; also `/KIND`), `length` (tokens), `cut_off` (fraction of the
        samples); where there are any, `not_applicable` and `failed`: fractions of the samples that the accuracy leaves out, since
        its function does not apply to them, or failed.
    """
    samples = list(rows)
    kinds = sorted({kind for row in samples if (kind := _kind(row, by)) is not None})
    out: dict[str, float] = {}
    for suffix, part in [("", samples), *((f"/{k}", [r for r in samples if _kind(r, by) == k]) for k in kinds)]:
        right = _right_by_prompt(part, accuracy, threshold)
        if right:
            found = estimate(right)
            out[f"accuracy{suffix}"] = found.mean
            if not suffix:
                out["accuracy_error"] = found.standard_error
        for name in dict.fromkeys(p["name"] for row in part for p in row["rewards"]):
            values = [v for row in part if (v := _value(row, name)) is not None]
            if values:
                out[f"reward/{name}{suffix}"] = fmean(values)
        for what, status in (("not_applicable", (ScoreStatus.NOT_APPLICABLE,)), ("failed", FAILED)):
            if left_out := fmean(_status(row, accuracy) in status for row in part):
                out[f"{what}{suffix}"] = left_out
        out[f"length{suffix}"] = fmean(len(row["completion_ids"]) for row in part)
        out[f"cut_off{suffix}"] = fmean(row["finish_reason"] != "stop" for row in part)
    return out


def _right_by_prompt(rows: Sequence[Row], accuracy: str, threshold: float) -> list[float]:
    out = []
    for _, group in itertools.groupby(rows, key=lambda row: row["prompt_id"]):
        values = [v for row in group if (v := _value(row, accuracy)) is not None]
        if values:
            out.append(fmean(v >= threshold for v in values))
    return out


def _value(row: Row, name: str) -> float | None:
    part = _part(row, name)
    return part["value"] if part is not None and part["status"] == ScoreStatus.OK else None


def _status(row: Row, name: str) -> str | None:
    part = _part(row, name)
    return None if part is None else part["status"]


def _part(row: Row, name: str) -> Row | None:
    return next((p for p in row["rewards"] if p["name"] == name), None)


def _kind(row: Row, by: str | None) -> str | None:
    value = row["columns"].get(by) if by else None
    return None if value is None else str(value)
