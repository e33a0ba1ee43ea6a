"""`make bench-sandbox`: ordinary programs through the reward `code`, on one core. Their scores have to be right; the figure is how
many programs one core runs in a second."""

from __future__ import annotations

import os
import sys
import time

from rich.console import Console
from rich.table import Table

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.types import ScoreStatus
from tests.bench.programs import TASKS, ordinary

COUNT = 10_000
FORMS = ("standard input and output", "calls of a function", "asserts, in a sandbox of their own")


def score_ordinary(code: RewardFunction, index: int) -> str:
    """What is wrong with the score of this program; "" where nothing is."""
    row = ordinary(index)
    (result,) = call_reward(code, ScoreInputs(["p"], [row.completion], [[1]], {"tests": [row.tests]}))
    if (result.status, result.value) == (ScoreStatus.OK, row.value):
        return ""
    return (
        f"program {index} got {result.status} {result.value} ({result.detail}), is worth {row.value}:\n{row.completion}"
    )


def main() -> None:
    first, count = (int(a) for a in (sys.argv[1:] or ("0", str(COUNT))))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    # Wall time is what a busy machine takes away from a program that deserves it.
    code = resolve(RewardFunctionConfig(name="code", args={"timeout_s": 60.0}))
    seconds, done, wrong = [0.0] * len(FORMS), [0] * len(FORMS), []
    for index in range(first, first + count):
        form = index // len(TASKS) % len(FORMS)
        started = time.perf_counter()
        wrong += [trouble] if (trouble := score_ordinary(code, index)) else []
        seconds[form] += time.perf_counter() - started
        done[form] += 1
    table = Table(
        "3 tests each", "programs", "a second, one core", title=f"{count:,} programs, {len(wrong)} with a wrong score"
    )
    for form, name in enumerate(FORMS):
        table.add_row(name, f"{done[form]:,}", f"{done[form] / seconds[form]:.1f}" if done[form] else "")
    table.add_row("all", f"{count:,}", f"{count / sum(seconds):.1f}")
    Console().print(table)
    sys.exit("\n".join(wrong[:5]) or None)


if __name__ == "__main__":
    main()
