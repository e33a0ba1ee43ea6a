"""Tasks of several turns on this machine, each from a cold start by SFT to GRPO in an environment: wins before and after."""

from __future__ import annotations

import time

from grpo_ray.errors import WorkerError
from launch.console import headed, plain_console
from launch.run.jobs import start_grpo, start_sft
from launch.run.recipe import with_own
from launch.run.smoke import held_out_accuracy, link_cold_start

GOAL = 0.80
TASKS = ("guess_number", "calculator_tiny")
"""The recipes; the cold start of each has its name and `_sft`."""


def run_episodes(overrides: list[str]) -> None:
    """Run every task; overrides go to GRPO. Raises WorkerError when one of them stays below the goal."""
    console = plain_console(soft_wrap=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    below = []
    for task in TASKS:
        name, began = task.replace("_", "-"), time.monotonic()
        console.print(
            headed(f"{task} 1/2", "bold", f": the rules of the task, from a random model (grpo-ray sft {task}_sft)")
        )
        cold = start_sft(f"{task}_sft", [f"name={name}-{stamp}-sft"])
        console.print(headed(f"{task} 2/2", "bold", f": it learns from whole episodes (grpo-ray train {task})"))
        run = start_grpo(task, with_own([f"name={name}-{stamp}", f"model.path={cold / 'hf'}"], overrides))
        link_cold_start(cold, f"{name}-sft")
        before, after = held_out_accuracy(run)
        minutes = (time.monotonic() - began) / 60
        console.print(headed(f"\n{task}: wins {before:.1%} -> {after:.1%}", "bold", f" in {minutes:.1f} minutes\n"))
        if after < GOAL:
            below.append(f"{task} wins {after:.1%}; see {run}/report.html")
    if below:
        raise WorkerError(f"below the goal of {GOAL:.0%} after training: {'; '.join(below)}")
