"""How many workers of each role a run has, when that changes while it runs.

    grpo-ray scale RUN rollout=4 reward=16  ->  parse_counts  ->  rescaled config  ->  pools, learners  ->  config.yaml
    every step: Load of each role           ->  decide        ->  the same way

A run's config.yaml keeps the numbers asked for last, so a resumed run begins with them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from grpo_ray.config import RunConfig, build, deep_merge, load_yaml
from grpo_ray.errors import ConfigError

SCALED = ("rollout", "reward", "learner")
"""The roles, by their sections of the config."""
PAIRED = ("rollout", "learner")
"""Those that share devices when they are colocated."""
Counts = dict[str, int]
"""Role -> workers."""


def counts(config: RunConfig) -> Counts:
    return {
        "rollout": config.rollout.num_actors,
        "reward": config.reward.num_actors,
        "learner": config.learner.num_actors,
    }


def parse_counts(words: Sequence[str]) -> Counts:
    """`["rollout=4", "reward=16"]` -> numbers.

    Raises:
        ConfigError: a word that is not ROLE=NUMBER, a role given twice, or none at all.
    """
    out: Counts = {}
    for word in words:
        role, _, number = word.partition("=")
        if role not in SCALED or not number.isdecimal() or not number.isascii() or int(number) < 1:
            raise ConfigError(f"{word!r} is not ROLE=NUMBER, with a role of {', '.join(SCALED)} and 1 or more workers")
        if role in out:
            raise ConfigError(f"{role} is given twice")
        out[role] = int(number)
    if not out:
        raise ConfigError("scale what? Give one or more of rollout=N, reward=N, learner=N")
    return out


def rescaled(config: RunConfig, asked: Mapping[str, int]) -> RunConfig:
    """The config with other numbers of workers.

    Raises:
        ConfigError: numbers that this run can't have.
    """
    changed = {role: number for role, number in asked.items() if number != counts(config)[role]}
    if config.colocated and (paired := [role for role in PAIRED if role in changed]):
        raise ConfigError(
            f"cluster.placement is colocated: an engine and a learner take turns on each device, so {' and '.join(paired)} can't "
            "be scaled while the run goes on; stop it, change num_actors in its config.yaml, and resume it"
        )
    top = {role: {"num_actors": number} for role, number in changed.items()}
    return build(RunConfig, deep_merge(config.model_dump(mode="json"), top), f"`{told(asked)}`")


def told(asked: Mapping[str, int]) -> str:
    """`rollout=4 reward=16`."""
    return " ".join(f"{role}={number}" for role, number in asked.items())


def change(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """`rollout 1 -> 2, learner stays 1`, of the roles in `after`."""
    return ", ".join(
        f"{role} {before[role]} -> {number}" if number != before[role] else f"{role} stays {number}"
        for role, number in after.items()
    )


def record(path: Path, numbers: Mapping[str, int]) -> None:
    """Write the numbers into a run's config.yaml; all of it, or nothing."""
    top = {role: {"num_actors": number} for role, number in numbers.items()}
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(yaml.safe_dump(deep_merge(load_yaml(path), top), sort_keys=False, allow_unicode=True))
    os.replace(aside, path)
