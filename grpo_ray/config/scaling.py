"""The number of workers of each role, when it changes during a run.

    grpo-ray scale RUN rollout=4 reward=16  ->  parse_counts  ->  rescaled config  ->  pools, learners  ->  config.yaml
    every step: Load of each role           ->  decide        ->  the same way

A run's config.yaml keeps the numbers requested last, so a resumed run begins with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from grpo_ray.config.environment import ENVIRONMENT_POOL
from grpo_ray.config.loading import build, deep_merge, load_yaml
from grpo_ray.config.reward import SHARED_POOL
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.yaml import dump_yaml
from grpo_ray.errors import ConfigError
from grpo_ray.files import write_whole

SCALED = ("rollout", "reward", "environment", "learner")
"""The roles that scale, by their sections of the config."""
PAIRED = ("rollout", "learner")
"""The roles that share devices when they are colocated."""
SELF_SCALED = ("rollout", "reward")
"""The roles that may have bounds: starting and stopping one costs next to nothing."""
Counts = dict[str, int]
"""Role -> number of workers."""
PATIENCE = 3
"""The number of consecutive steps that must agree before anything changes."""
WORTH_GROWING = 0.25
"""The fraction of a step that the run waits for a role, below which more workers gain little."""
AT_WORK = 0.8
"""The busy fraction of the time that the run waits for the workers: below it they themselves wait, for one long sample, and more of
them would too."""
IDLE = 0.1
"""The largest fraction of a step that workers are busy if there are more than needed. After doubling one worker that was worth it,
both are busy for a seventh of a step at least; after removing one of two, the other is busy for less than a fifth. So neither rule
undoes the other."""


def counts(config: RunConfig) -> Counts:
    environments = {} if config.environment is None else {ENVIRONMENT_POOL: config.environment.num_actors}
    return {
        "rollout": config.rollout.num_actors,
        "reward": config.reward.num_actors,
        **environments,
        "learner": config.learner.num_actors,
    }


def bounds(config: RunConfig, role: str) -> tuple[int, int]:
    """The least and the most workers that the run may choose; both are the present number if it may not change."""
    section = config.rollout if role == "rollout" else config.reward
    return section.min_actors or section.num_actors, section.max_actors or section.num_actors


def parse_counts(words: Sequence[str]) -> Counts:
    """Role -> number of workers, from `["rollout=4", "reward=16"]`.

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
        raise ConfigError("scale what? Give one or more of rollout=N, reward=N, environment=N, learner=N")
    return out


def rescaled(config: RunConfig, asked: Mapping[str, int]) -> RunConfig:
    """The config with other numbers of workers.

    Raises:
        ConfigError: numbers that this run can't have.
    """
    if ENVIRONMENT_POOL in asked and config.environment is None:
        raise ConfigError("this run has no environments to scale; it has no section `environment`")
    changed = {role: number for role, number in asked.items() if number != counts(config)[role]}
    if config.colocated and (paired := [role for role in PAIRED if role in changed]):
        raise ConfigError(
            f"cluster.placement is colocated: an engine and a learner take turns on each device, so {' and '.join(paired)} can't "
            "be scaled while the run goes on; stop it, change num_actors in its config.yaml, and resume it"
        )
    if "reward" in changed and SHARED_POOL not in config.reward.pools:
        raise ConfigError(
            "every reward function has workers of its own, which stay as reward.functions has them; stop the run, change "
            "workers.num_actors in its config.yaml, and resume it"
        )
    top = {role: {"num_actors": number} for role, number in changed.items()}
    return build(RunConfig, deep_merge(config.model_dump(mode="json"), top), f"`{told(asked)}`")


@dataclass(frozen=True)
class Load:
    """The load on the workers of one role in one step."""

    busy: float
    """The fraction of the step that they were busy, averaged over them."""
    wait_fraction: float
    """The fraction of the step in which the run only waited for them."""
    waiting: int
    """The largest number of samples that queued for one of them."""


def load_of(role: str, metrics: Mapping[str, float], waiting: int) -> Load | None:
    """The load in a step by its metrics; None if these do not show it."""
    step_s, busy = metrics.get("time/step", 0.0), metrics.get(f"busy/{role}")
    if step_s <= 0 or busy is None:
        return None
    alone_s = metrics.get("time/rollout" if role == "rollout" else "reward/alone_s", 0.0)
    return Load(busy, alone_s / step_s, waiting)


def decide(now: int, low: int, high: int, loads: Sequence[Load]) -> int:
    """The number of workers that there should be, from `low` to `high`.

    It grows by a quarter, at least by one, if in each of the last PATIENCE steps the run waited for the workers, they were busy
    nearly all that time, and samples queued. It shrinks by as much if in each of them they were mostly idle and no sample queued.

    Args:
        loads: one for each step since the number last changed, oldest first.
    """
    last = loads[-PATIENCE:]
    if len(last) < PATIENCE:
        return now
    by = max(1, now // 4)
    if all(x.waiting > 0 and x.wait_fraction >= WORTH_GROWING and x.busy >= AT_WORK * x.wait_fraction for x in last):
        return min(high, now + by)
    if all(x.waiting == 0 and x.busy <= IDLE for x in last):
        return max(low, now - by)
    return now


def told(asked: Mapping[str, int]) -> str:
    """The request as text: `rollout=4 reward=16`."""
    return " ".join(f"{role}={number}" for role, number in asked.items())


def change(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """The change as text, for the roles in `after`: `rollout 1 -> 2, learner stays 1`."""
    return ", ".join(
        f"{role} {before[role]} -> {number}" if number != before[role] else f"{role} stays {number}"
        for role, number in after.items()
    )


def record(path: Path, numbers: Mapping[str, int]) -> None:
    """Write the numbers into a run's config.yaml, atomically."""
    top = {role: {"num_actors": number} for role, number in numbers.items()}
    write_whole(path, dump_yaml(deep_merge(load_yaml(path), top)).encode())
