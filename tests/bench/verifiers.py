"""`make bench-verifiers`: 1,000 answers through the reward `reasoning_gym`, against its verifiers called in this process, as they
were before they had a sandbox. In turns, so that both see the same machine; the best of each counts."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import reasoning_gym as library
from reasoning_gym.factory import DATASETS
from rich.console import Console
from rich.table import Table

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.functions.function import ScoreInputs, inspect_function
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.types import ScoreStatus

COUNT = 1000
ROWS, ROUNDS = 3, 5
LEFT_OUT = {"composite", "arc_agi", "rearc", "figlet_font", "group_anagrams", "codeio"}
"""One has no verifier of its own, and the others take seconds to make their rows."""
ONE_TASK = ("chain_sum", "countdown")


def rows_of(tasks: list[str], count: int) -> ScoreInputs:
    """Rows in turn, every other answer wrong."""
    kinds = [(t, e) for t in tasks for e in library.create_dataset(t, seed=1, size=ROWS)]
    made = list(itertools.islice(itertools.cycle(kinds), count))
    texts = [f"<answer>{e['answer'] if i % 2 else f'none of these {i}'}</answer>" for i, (_, e) in enumerate(made)]
    columns: dict[str, list[Any]] = {"reasoning_gym_task": [t for t, _ in made]}
    columns["reasoning_gym_entry"] = [e for _, e in made]
    return ScoreInputs(["p"] * count, texts, [[1]] * count, columns)


def in_this_process(tasks: list[str]) -> Callable[..., Any]:
    verifiers = {task: library.get_score_answer_fn(task) for task in tasks}

    def score(completions: Any, reasoning_gym_entry: Any, reasoning_gym_task: Any) -> list[float]:
        rows = zip(completions, reasoning_gym_entry, reasoning_gym_task, strict=True)
        return [one(verifiers[task], answer_of(text), entry) for text, entry, task in rows]

    def one(verifier: Any, answer: str, entry: Any) -> float:
        try:
            return float(verifier(answer, entry))
        except Exception:
            return 0.0

    return score


def seconds(function: Any, inputs: ScoreInputs, at_once: int) -> tuple[float, float]:
    """By the wall's clock, and of processors, the sandbox's included."""
    calls = [inputs.take(range(i, min(i + at_once, len(inputs)))) for i in range(0, len(inputs), at_once)]
    started, used = time.perf_counter(), processor_seconds()
    results = [r for call in calls for r in call_reward(function, call)]
    took = time.perf_counter() - started, processor_seconds() - used
    assert {r.status for r in results} == {ScoreStatus.OK}
    return took


def processor_seconds() -> float:
    below = [p.cpu_times() for p in psutil.Process().children(recursive=True)]
    return time.process_time() + sum(t.user + t.system for t in below)


def main() -> None:
    rounds = int(sys.argv[1]) if sys.argv[1:] else ROUNDS
    every = sorted(set(DATASETS) - LEFT_OUT)
    sandboxed = resolve(RewardFunctionConfig(name="reasoning_gym"), load=True)
    table = Table(
        *(f"{COUNT:,} answers", "in one call", "here / in the sandbox, s", "ratio", "processors, s", "ratio"),
        title="reasoning_gym",
    )
    for name, tasks in (("of all tasks", every), *((task, [task]) for task in ONE_TASK)):
        inputs = rows_of(tasks, COUNT)
        bare = inspect_function("bare", in_this_process(tasks), 1.0, {})
        for at_once in (COUNT, 1):
            took = [[seconds(f, inputs, at_once) for f in (bare, sandboxed)] for _ in range(rounds)]
            cells = []
            for clock in range(2):
                here, there = (min(each[side][clock] for each in took) for side in range(2))
                cells += [f"{here:.3f} / {there:.3f}", f"{there / here:.2f}"]
            table.add_row(name, f"{at_once:,}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
