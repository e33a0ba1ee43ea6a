"""Fitting a run to this machine's memory: micro-batches that fit, or one line on what takes how much if nothing helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.models.memory.estimate import (
    CONTROLLER_BASE,
    RAY_BASE,
    REWARD_BASE,
    ModelFacts,
    engine_memory,
    gib,
    learner_memory,
    route_memory,
    weight_bytes,
)
from grpo_ray.models.memory.kv_cache import DEFAULT_GB

Config = TypeVar("Config", bound=RunConfig | SftConfig)
MARGIN = 0.1
"""The possible error of an estimate, as a fraction of the free memory: choices leave it free, and runs beyond it are refused."""


@dataclass(frozen=True)
class Part:
    """The memory of one kind of process on this machine."""

    what: str
    number: int
    each: int
    """The bytes of each process."""
    mend: str
    """The options that lower it; empty if none does."""

    @property
    def total(self) -> int:
        return self.number * self.each

    def __str__(self) -> str:
        many = f"{self.number} x " if self.number > 1 else ""
        return f"{self.what} {many}{gib(self.each)}" + (f" ({self.mend})" if self.mend else "")


def parts_of(facts: ModelFacts, config: RunConfig | SftConfig, kind: str) -> list[Part]:
    """The parts of a run on CPUs, all on this machine, the largest first.

    Args:
        kind: the kind of run: `eval` and `sample` start no learners.
    """
    routes = route_memory(facts, config) if isinstance(config, RunConfig) and kind == "train" else 0
    ray_mend = "rollout.keep_routing=false" if routes else ""
    parts = [Part("the controller", 1, CONTROLLER_BASE, ""), Part("Ray", 1, RAY_BASE + routes, ray_mend)]
    if kind not in ("eval", "sample"):
        memory = learner_memory(facts, config, on_gpu=False)
        parts.append(Part("learner", config.learner.num_actors, memory.total, _learner_mend(config)))
    if isinstance(config, RunConfig):
        synced = kind not in ("eval", "sample") and not config.model.sends_adapters
        if synced:
            parts.append(Part("weights on their way to the engines", 1, weight_bytes(facts, config.model), ""))
        engine = engine_memory(facts, config, config.rollout.kv_cache_gb or DEFAULT_GB, synced=synced)
        parts.append(
            Part("rollout", config.rollout.num_actors, sum(engine.values()), "rollout.num_actors, rollout.kv_cache_gb")
        )
        workers = sum(pool.num_actors for pool in config.reward.pools.values())
        parts.append(Part("reward", workers, REWARD_BASE, "reward.num_actors"))
    return sorted(parts, key=lambda part: -part.total)


def _learner_mend(config: RunConfig | SftConfig) -> str:
    more = [
        name
        for name, used in (
            ("model.gradient_checkpointing=true", config.model.checkpoints(on_gpu=False)),
            ("model.lora", config.model.lora is not None or isinstance(config, RewardModelConfig)),
        )
        if not used
    ]
    return ", ".join(["learner.micro_batch_tokens", *more])


def fit_memory(facts: ModelFacts, config: Config, kind: str, free: int, *, engines_are_open: bool) -> Config:
    """The config with values that fit the free memory for options that no recipe has set: fewer engines, and the largest
    micro-batch of the default, a half of it, a quarter, .. that holds the longest sample."""
    found = _fit_micro_batch(facts, config, kind, free)
    if not isinstance(config, RunConfig) or not engines_are_open or config.rollout.num_actors == 1:
        return found
    if fits(facts, found, kind, free):
        return found
    fewer = config.rollout.model_copy(update={"num_actors": config.rollout.num_actors // 2})
    less = cast(Config, config.model_copy(update={"rollout": fewer}))
    return fit_memory(facts, less, kind, free, engines_are_open=True)


def _fit_micro_batch(facts: ModelFacts, config: Config, kind: str, free: int) -> Config:
    if kind in ("eval", "sample") or not config.learner.micro_batch_is_open:
        return config
    found = config
    for tokens in micro_batches(shortest(config)):
        found = with_tokens(config, tokens)
        if fits(facts, found, kind, free):
            return found
    return found


def micro_batches(least: int, most: int = LearnerConfig.model_fields["micro_batch_tokens"].default) -> Iterator[int]:
    """most, half of it, .. tokens, as long as they hold more than `least`; at the end `least` itself."""
    while most > least:
        yield most
        most //= 2
    yield least


def unfitted_micro_batch(config: Config) -> Config:
    """The config with the default micro-batch, or one sample of full length, where it leaves it open."""
    if not config.learner.micro_batch_is_open:
        return config
    return with_tokens(config, next(micro_batches(shortest(config))))


def shortest(config: RunConfig | SftConfig) -> int:
    """The fewest tokens of a micro-batch: one sample of full length, or a pair."""
    if isinstance(config, RunConfig):
        return config.data.max_prompt_length + config.rollout.max_completion_length
    pairs = isinstance(config, DpoConfig) or (isinstance(config, RewardModelConfig) and config.reward_model.pairwise)
    return config.max_length * (2 if pairs else 1)


def with_tokens(config: Config, tokens: int) -> Config:
    learner = config.learner.model_copy(update={"micro_batch_tokens": tokens})
    return cast(Config, config.model_copy(update={"learner": learner}))


def fits(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, free: int) -> bool:
    return sum(part.total for part in parts_of(facts, config, kind)) <= (1 - MARGIN) * free


def too_large(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, free: int) -> str | None:
    """One line on what takes how much of a run that can't fit, with the options that lower each; None if it may fit."""
    parts = parts_of(facts, config, kind)
    total = sum(part.total for part in parts)
    if total <= (1 + MARGIN) * free:
        return None
    return f"about {gib(total)} of memory are needed, and {gib(free)} are free: {', '.join(map(str, parts))}"
