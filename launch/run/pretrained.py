"""The run of a real pretrained model on this machine: GRPO on word problems that it half knows, to a visible gain."""

from __future__ import annotations

import time

from grpo_ray.errors import WorkerError
from launch.console import headed, plain_console
from launch.run.jobs import start_grpo
from launch.run.pretrained_model import find_model
from launch.run.recipe import with_own
from launch.run.smoke import held_out_accuracy
from launch.run.tree_memory import PeakMemory

RECIPE = "arithmetic_smollm2"
GAIN = 0.10
"""The least gain in held-out accuracy that counts as learning: more than twice its standard error over 192 prompts."""


def run_pretrained(overrides: list[str]) -> None:
    """Find the model and train it. Raises WorkerError when the held-out accuracy gains too little, ConfigError as `find_model`."""
    console = plain_console(soft_wrap=True)
    began = time.monotonic()
    own = [f"name=pretrained-{time.strftime('%Y%m%d-%H%M%S')}"]
    if not any(item.partition("=")[0].strip() == "model.path" for item in overrides):
        own.append(f"model.path={find_model(console.print)}")
    with PeakMemory() as memory:
        run = start_grpo(RECIPE, with_own(own, overrides))
    before, after = held_out_accuracy(run)
    seconds = time.monotonic() - began
    head = headed(f"\nheld-out accuracy {before:.1%} -> {after:.1%}", "bold", "")
    console.print(head.append(f" in {seconds:,.0f} s, with {memory.peak / 2**30:.1f} GiB at most in all processes"))
    if after < before + GAIN:
        raise WorkerError(
            f"held-out accuracy went from {before:.1%} to {after:.1%}, and a gain of {GAIN:.0%} is the goal; see {run}/report.html"
        )
