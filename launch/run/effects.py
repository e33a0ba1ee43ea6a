"""The warnings about options that have no effect in a command."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from grpo_ray.config.effects import check_context, not_looked_at, without_effect
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.files.loading import known_context
from grpo_ray.pipeline.effects import pipeline_without_effect, stage_without_effect
from grpo_ray.pipeline.plan import Plan
from launch.console import plain_console
from launch.run.hub import check_hub

console = plain_console(soft_wrap=True, stderr=True)
SHARED = ("sample", "eval")
"""The commands that take recipes of `grpo-ray train`, most options of which do not concern them."""


def check_effects(config: RunConfig | SftConfig, command: str, overrides: list[str]) -> None:
    """Warn of options without an effect.

    Raises:
        ConfigError: an option was typed for this command, which ignores it; or the model has no room for what is requested.
    """
    others = not_looked_at(config, command)
    for item in overrides:
        typed = item.partition("=")[0].strip()
        for key, why in others.items():
            if f"{key}.".startswith(f"{typed}.") or typed.startswith(f"{key}."):
                raise ConfigError(f"override {item!r}: {key}: {why}; leave it out")
    context = known_context(config.model)
    if context is not None:
        check_context(config, context)
    _tell(without_effect(config, command) if command in SHARED else others | without_effect(config, command))


def tell_idle_of_pipeline(plan: Plan) -> None:
    """Report idle options of the pipeline, and of each of its stages except for what it shares with others."""
    _tell(pipeline_without_effect(plan.config))
    for stage in plan.stages:
        found = stage_without_effect(plan.config_of(stage), stage.spec.run)
        _tell({f"stage {stage.name}: {key}": why for key, why in found.items()})


def tell_of_hub(config: RunConfig | SftConfig) -> None:
    """Report the result of `check_hub`; raises ConfigError as it does."""
    if (text := check_hub(config)) is not None:
        console.print(f"warning: {text}", style="yellow", markup=False)


def _tell(found: Mapping[str, str]) -> None:
    for line in told(found):
        console.print(f"warning: {line}", style="yellow")


def told(found: Mapping[str, str]) -> list[str]:
    """A line for each reason."""
    by_why = sorted(found.items(), key=lambda entry: entry[1])
    return [
        f"{', '.join(key for key, _ in entries)}: no effect: {why}"
        for why, entries in groupby(by_why, key=lambda entry: entry[1])
    ]
