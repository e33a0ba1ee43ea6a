"""Figures of a folder of samples: means over those that have a reward, and how many have none, and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from grpo_ray.types import ScoreStatus


@dataclass(frozen=True)
class Worth:
    """The figures of one reward function, or of all together."""

    mean: float | None
    """The mean over the scored samples; None if there are none."""
    num_scored: int
    num_not_applicable: int
    num_failed: int

    def __str__(self) -> str:
        mean = "none" if self.mean is None else f"{self.mean:.4g}"
        others = [
            f"{number} {what}"
            for number, what in ((self.num_not_applicable, "not applicable"), (self.num_failed, "failed"))
            if number
        ]
        return f"{mean} over {self.num_scored}" + (f" ({', '.join(others)})" if others else "")


@dataclass(frozen=True)
class Figures:
    reward: Worth
    """The figures of the weighted sum."""
    functions: dict[str, Worth]
    """The figures by function title, in the order of the recipe, without its weight."""
    num_samples: int
    mean_length: float | None
    """The mean number of sampled tokens."""

    def __str__(self) -> str:
        parts = "; ".join(f"{name} {worth}" for name, worth in self.functions.items())
        return f"mean reward {self.reward} samples: {parts}" if parts else f"mean reward {self.reward} samples"


@dataclass
class _Sum:
    values: list[float] = field(default_factory=list)
    not_applicable: int = 0
    failed: int = 0

    def add(self, status: str, value: float | None) -> None:
        if status == ScoreStatus.OK and value is not None:
            self.values.append(value)
        elif status == ScoreStatus.NOT_APPLICABLE:
            self.not_applicable += 1
        else:
            self.failed += 1

    @property
    def worth(self) -> Worth:
        mean = fsum(self.values) / len(self.values) if self.values else None
        return Worth(mean, len(self.values), self.not_applicable, self.failed)


def figures_of(rows: Iterable[dict[str, Any]]) -> Figures:
    """The figures of rows as `grpo-ray sample` writes them: `reward`, `reward_status`, `rewards` and `num_sampled`."""
    total, by_name, num_sampled = _Sum(), dict[str, _Sum](), []
    for row in rows:
        total.add(row["reward_status"], row["reward"])
        num_sampled.append(row["num_sampled"])
        for part in row["rewards"]:
            by_name.setdefault(part["name"], _Sum()).add(part["status"], part["value"])
    return Figures(
        reward=total.worth,
        functions={name: found.worth for name, found in by_name.items()},
        num_samples=len(num_sampled),
        mean_length=sum(num_sampled) / len(num_sampled) if num_sampled else None,
    )


def figures_in(folder: Path) -> Figures:
    """The figures of the existing files in a folder of samples."""
    return figures_of(row for file in sorted(folder.glob("samples-*.parquet")) for row in _rows(file))


def _rows(file: Path) -> Iterable[dict[str, Any]]:
    with pq.ParquetFile(file) as parquet:
        # Files of earlier versions, whose samples had one turn, do not have the column `num_sampled`.
        there = "num_sampled" if "num_sampled" in parquet.schema_arrow.names else "completion_ids"
        for batch in parquet.iter_batches(columns=["reward", "reward_status", "rewards", there]):
            column = batch.column(there)
            lengths = (column if there == "num_sampled" else column.value_lengths()).to_pylist()
            rows = batch.drop_columns([there]).to_pylist()
            yield from ({**row, "num_sampled": n} for row, n in zip(rows, lengths, strict=True))
