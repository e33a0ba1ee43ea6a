"""The number of steps of a run, and of its prompts or examples, by `num_steps`, or `num_epochs` and `data.last_batch`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError


@dataclass(frozen=True)
class RunLength:
    """The length of a run if nothing is dropped: otherwise it may end earlier, never later."""

    num_steps: int
    size: int
    """The number of rows of a whole batch."""
    num_rows: int
    """The number of rows that these steps train on, over all epochs."""
    end: int | None = None
    """The number of rows taken from the data at most, whatever is dropped; None: as many as the steps need."""
    whole_batches: bool = False
    """Whether the last rows are left out if they don't fill a batch."""

    def num_left(self, taken: int, passed_over: Collection[int] = ()) -> float:
        """The number of rows that may still be taken.

        Args:
            taken: the number of rows taken so far.
            passed_over: positions of rows, counted from the start of the run, that will be skipped.
        """
        end = self.end
        if end is None:
            return math.inf
        return max(0, end - taken - sum(taken <= place < end for place in passed_over))

    def steps_from(self, step: int, num_left: float) -> int:
        """The number of steps of the whole run, which has done `step` of them. It exceeds `num_steps` if the run was shorter
        before: its last batch was then not whole, so the rest takes one step more.

        Args:
            num_left: the number of rows that may still be trained on.
        """
        if self.end is None or self.whole_batches:
            return self.num_steps
        return max(self.num_steps, step + -(-int(num_left) // self.size))

    def next_batch(self, num_left: float, num_begun: int = 0) -> int:
        """The number of rows of the next batch; 0 if there is none.

        Args:
            num_left: the number of rows that may still be taken.
            num_begun: the number of rows that are taken but not yet in a batch.
        """
        found = int(min(self.size, num_begun + num_left))
        return 0 if self.whole_batches and found < self.size else found


def run_length(config: RunConfig | SftConfig, num_rows: int) -> RunLength:
    """The length of a run on this data.

    Args:
        num_rows: the number of prompts or examples of one epoch.

    Raises:
        ConfigError: `data.last_batch` is `drop`, and no batch is whole.
    """
    size = step_size(config)
    if config.num_steps is not None:
        return RunLength(config.num_steps, size, config.num_steps * size)
    total = rows_of_epochs(config, num_rows)
    steps = -(-total // size)
    match config.data.last_batch:
        case "short":
            return RunLength(steps, size, total, end=total)
        case "wrap":
            return RunLength(steps, size, steps * size)
        case "drop":
            steps = total // size
            if steps == 0:
                what, option = _names(config)
                raise ConfigError(
                    f"data.last_batch drop: the {total} {what} of {_epochs(config)} are fewer than the {size} of a batch, so there "
                    f"is no step; lower {option}, raise num_epochs, or use data.last_batch short or wrap"
                )
            return RunLength(steps, size, steps * size, end=total, whole_batches=True)


def rows_of_epochs(config: RunConfig | SftConfig, num_rows: int) -> int:
    """The number of rows of num_epochs, rounded up, from the number as typed, since 0.29 in binary is slightly less."""
    return math.ceil(Fraction(repr(config.num_epochs)) * num_rows)


def used_up(config: RunConfig, step: int, planned: int, reasons: dict[str, int]) -> str:
    """The message for a run that ends before its last step. `reasons`: cause -> number of groups dropped for it."""
    why = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    return f"the prompts of {_epochs(config)} are used up after step {step} of {planned}; groups were dropped: {why}"


def step_size(config: RunConfig | SftConfig) -> int:
    """The number of prompts or examples of a whole batch."""
    return config.prompts_per_step if isinstance(config, RunConfig) else config.examples_per_step


def describe(config: RunConfig | SftConfig, num_rows: int) -> str:
    """The length of a run as text: `10 prompts, 1 epoch: 3 steps, the last of 2 prompts`. Raises as `run_length` does."""
    length, size = run_length(config, num_rows), step_size(config)
    what = _names(config)[0].removesuffix("s")
    steps = _count(length.num_steps, "step")
    if config.num_steps is not None:
        return f"{_count(num_rows, what)}: {steps} of {size}, {length.num_rows / num_rows:.3g} epochs"
    text = f"{_count(num_rows, what)}, {_epochs(config)}: {steps}"
    odd = rows_of_epochs(config, num_rows) % size
    if not odd:
        return f"{text} of {size}"
    if length.num_rows < size:
        return f"{text} of {_count(length.num_rows, what)}"
    match config.data.last_batch:
        case "short":
            return f"{text}, the last of {_count(odd, what)}"
        case "wrap":
            return (
                f"{text} of {size}, the last with {_count(size - odd, what)} of the epoch after, trained once too often"
            )
        case "drop":
            return f"{text} of {size}, without the last {_count(odd, what)}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number > 1)}"


def _epochs(config: RunConfig | SftConfig) -> str:
    return f"{config.num_epochs:g} epoch{'s' * (config.num_epochs > 1)}"


def _names(config: RunConfig | SftConfig) -> tuple[str, str]:
    if isinstance(config, RunConfig):
        return "prompts", "prompts_per_step"
    return "examples", "examples_per_step"
