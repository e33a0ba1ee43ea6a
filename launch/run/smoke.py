"""The smoke run, on this machine: cold start by SFT, then GRPO, to 90% of the task; and tiny models in environments likewise."""

from __future__ import annotations

import time
from pathlib import Path

from grpo_ray import json_text
from grpo_ray.errors import WorkerError
from grpo_ray.files import link_whole
from launch.console import headed, plain_console
from launch.program import program, runnable
from launch.run.jobs import start_grpo, start_sft
from launch.run.recipe import with_own

GOAL = 0.90
COLD_START = "smoke-sft"
"""The name of the run that `grpo-ray sft smoke_sft` creates."""
EPISODES_GOAL = 0.80
EPISODES = ("guess_number", "calculator_tiny")
"""The recipes of several turns; the cold start of each has its name and `_sft`."""


def run_smoke(overrides: list[str]) -> None:
    """Run both stages; overrides go to GRPO. Raises WorkerError when the held-out accuracy stays below the goal."""
    console = plain_console(soft_wrap=True)
    began = time.monotonic()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    console.print(
        headed(
            "1/2 cold start",
            "bold",
            ": a random model of 2.3 M parameters learns flawed demonstrations (grpo-ray sft smoke_sft)",
        )
    )
    cold = start_sft("smoke_sft", [f"name=smoke-{stamp}-sft"])
    console.print(headed("2/2 GRPO", "bold", ": it learns from its own samples and a verifier (grpo-ray train smoke)"))
    run = start_grpo("smoke", with_own([f"name=smoke-{stamp}", f"model.path={cold / 'hf'}"], overrides))
    link_cold_start(cold, COLD_START)
    before, after = held_out_accuracy(run)
    minutes = (time.monotonic() - began) / 60
    console.print(headed(f"\nheld-out accuracy {before:.1%} -> {after:.1%}", "bold", f" in {minutes:.1f} minutes"))
    if after < GOAL:
        raise WorkerError(
            f"held-out accuracy {after:.1%} after training is below the goal of {GOAL:.0%}; see {run}/report.html"
        )
    console.print(f"next     {runnable('grpo-ray check smoke')}, or look at {run}/report.html{_on_path()}")


def run_episodes(overrides: list[str]) -> None:
    """Run every task; overrides go to GRPO. Raises WorkerError when one of them stays below the goal."""
    console = plain_console(soft_wrap=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    below = []
    for task in EPISODES:
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
        if after < EPISODES_GOAL:
            below.append(f"{task} wins {after:.1%}; see {run}/report.html")
    if below:
        raise WorkerError(f"below the goal of {EPISODES_GOAL:.0%} after training: {'; '.join(below)}")


def _on_path() -> str:
    """How to call the program by its bare name, where the shell does not find it."""
    called = program()
    return "" if called == "grpo-ray" else f"; for `grpo-ray` by itself: source {Path(called).parent}/activate"


def link_cold_start(cold: Path, name: str) -> None:
    """Link a cold start under the name that a recipe starts from, unless its own command has created that run."""
    link = cold.parent / name
    if link.is_symlink() or not link.exists():
        link_whole(link, cold.name)


def held_out_accuracy(run: Path) -> tuple[float, float]:
    """The accuracy of the first and the last evaluation of a run.

    Raises:
        WorkerError: there is no evaluation.
    """
    lines = [json_text.read(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["eval/accuracy"] for line in lines if line.get("eval/accuracy") is not None]
    if not values:
        raise WorkerError(
            f"no held-out accuracy was measured: eval.accuracy applies to no row of data.eval; see {run}/report.html"
        )
    return values[0], values[-1]
