"""The logs of a reward function besides its rewards: TRL's `log_extra` and `log_metric`.

    log_extra("gold_parsed", [..])     one value a sample: `rewards.extra` of its row in rollouts/ and samples/, as JSON
    log_metric("right_units", 0.4)     the metric `logged/right_units`, mean over all values of the step (of the evaluation)

Names and values may come from completions, which are untrusted: their number and length are bounded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.types import LoggedMetric

MAX_COLUMNS = 32
MAX_METRICS = 64
MAX_NAME_CHARS = 100
MAX_VALUE_CHARS = 2000
"""The largest number of characters of a value in an extra column; a longer one is truncated, with a note."""

Plain = str | float | bool | None


class CallLog:
    """The logs of one call of one reward function."""

    def __init__(self, reward: str, num_samples: int) -> None:
        self._reward = reward
        self._num_samples = num_samples
        self._columns: dict[str, list[Plain]] = {}
        self._metrics: dict[str, LoggedMetric] = {}

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Add a column to the records of the samples, with one value each. A second call for a column continues it, as in TRL.

        Raises:
            RewardError: there are more values than samples, too many columns, or the name is invalid.
        """
        kept = self._columns.setdefault(self._name("log_extra", column), [])
        if len(self._columns) > MAX_COLUMNS:
            raise RewardError(f"reward {self._reward!r}: log_extra has more than {MAX_COLUMNS} columns")
        if isinstance(values, str | bytes) or len(kept) + len(values) > self._num_samples:
            raise RewardError(self._wrong_length(column, f"{len(kept) + len(values)} values"))
        kept.extend(plain(value) for value in values)

    def log_metric(self, name: str, value: float) -> None:
        """Add a metric of the step. A value that is not finite is counted (`logged/NAME/not_finite`) and left out of the mean.

        Raises:
            RewardError: the value is no number, there are too many names, or the name is invalid.
        """
        key = self._name("log_metric", name)
        try:
            number = math.nan if value is None else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise RewardError(
                f"reward {self._reward!r}: log_metric({name!r}, ..) got a {type(value).__name__}, expected a number"
            ) from None
        before = self._metrics.get(key, LoggedMetric(key, 0.0, 0, 0))
        total = before.total + number
        if math.isfinite(total):
            self._metrics[key] = before._replace(total=total, num_finite=before.num_finite + 1)
        else:
            self._metrics[key] = before._replace(num_not_finite=before.num_not_finite + 1)
        if len(self._metrics) > MAX_METRICS:
            raise RewardError(f"reward {self._reward!r}: log_metric has more than {MAX_METRICS} names in one call")

    @property
    def metrics(self) -> tuple[LoggedMetric, ...]:
        return tuple(self._metrics.values())

    def extras(self) -> list[tuple[tuple[str, Plain], ...]]:
        """The (column, value) pairs of each sample, [S].

        Raises:
            RewardError: a column does not have one value for each.
        """
        for column, values in self._columns.items():
            if len(values) != self._num_samples:
                raise RewardError(self._wrong_length(column, f"{len(values)} values"))
        rows = zip(*self._columns.values(), strict=True) if self._columns else [()] * self._num_samples
        return [tuple(zip(self._columns, row, strict=True)) for row in rows]

    def _name(self, function: str, name: Any) -> str:
        try:
            return checked_name(name)
        except ValueError as e:
            raise RewardError(f"reward {self._reward!r}: {function} got the name {name!r:.80}, {e}") from None

    def _wrong_length(self, column: str, got: str) -> str:
        return (
            f"reward {self._reward!r}: log_extra({column!r}, ..) got {got}, expected a list of {self._num_samples}, one for each "
            "completion"
        )


def checked_name(name: Any) -> str:
    """The name. Raises ValueError if it can't be the name of a column or a metric."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise ValueError(f"expected up to {MAX_NAME_CHARS} printable characters")
    return name


def plain(value: Any) -> Plain:
    """The value in a type of JSON and Parquet: numbers (numpy's and torch's too) as they are, everything else as text."""
    if hasattr(value, "item"):
        with contextlib.suppress(ValueError, RuntimeError, TypeError):
            value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**53:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    try:
        text = str(value)
    except Exception:
        text = f"a {type(value).__name__}"
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"{text[:MAX_VALUE_CHARS]} .. ({len(text):,} characters)"
