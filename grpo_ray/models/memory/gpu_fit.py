"""Fitting a run to GPUs whose memory is known: what each holds of it, what does not fit, and the overrides with which it would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.models.memory.estimate import (
    BF16,
    FP32,
    GIB,
    ModelFacts,
    gib,
    learner_memory,
    route_memory,
    weight_bytes,
)
from grpo_ray.models.memory.fit import MARGIN, micro_batches, shortest, with_tokens

Config = TypeVar("Config", bound=RunConfig | SftConfig)
FP8 = 1
CONTEXT = int(1.0 * GIB)
"""The memory of a process on a GPU before it holds anything: CUDA's context, its libraries, NCCL's buffers."""
ENGINE_WORK = 3 * GIB
"""The memory of an engine beside weights and cache: activations of its largest step, CUDA graphs, buffers of a weight sync."""
ASLEEP = 2 * GIB
"""The memory of an engine that sleeps: its context and its graphs."""
GPUS_OF_NODE = 8
HOST_BASE = 3 * GIB
"""The host memory of a learner or an engine on a GPU: libraries, and pages pinned by the driver."""
LOADED = 1.2
"""The host memory in which a node loads a model shard by shard, in models."""
MOST_RANKS = 64
MOST_TOKENS = 32_768
"""The largest micro-batch that is chosen for a GPU: larger ones are no faster."""
EVAL_ALONE = ("eval", "sample")
ONE_ROLE = (*EVAL_ALONE, "replay")
"""The kinds of run that have no engines, or no learners."""


@dataclass(frozen=True)
class Need:
    """What one GPU has to hold of a kind of process, and what it has for it."""

    what: str
    needed: int
    room: int
    parts: Mapping[str, int]

    @property
    def fits(self) -> bool:
        return self.needed <= self.room

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib(n)}" for name, n in self.parts.items() if n)
        return f"{self.what} {gib(self.needed)} of {gib(self.room)} ({parts})"


def width_of(config: RunConfig | SftConfig) -> int:
    return BF16 if config.model.dtype == "bfloat16" else FP32


def learner_need(facts: ModelFacts, config: RunConfig | SftConfig, memory: int) -> Need:
    """The GPU of a learner rank in its largest step; where it takes turns with an engine, that one is asleep."""
    of_learner = learner_memory(facts, config, on_gpu=True, gpu_memory=memory).parts
    parts = {**of_learner, "CUDA and NCCL": CONTEXT}
    room = memory
    if isinstance(config, RunConfig):
        if config.colocated:
            parts["the sleeping engine"] = ASLEEP
        elif _shares_a_gpu(config):
            room = int((1 - config.rollout.gpu_memory_utilization) * memory)
    return Need("each learner", sum(parts.values()), room, parts)


def _shares_a_gpu(config: RunConfig) -> bool:
    """Whether an engine that never sleeps is on the learner's GPU."""
    return (config.learner.num_gpus or 1) < 1 and (config.rollout.num_gpus or 1) < 1


@dataclass(frozen=True)
class Cache:
    """The KV cache of each GPU of an engine."""

    room: int
    """Its bytes; below 0 if not even the weights fit."""
    per_token: int
    """The bytes of a token, on each GPU that has a part of it."""
    sample: int
    """The tokens of a sample of full length, with its prompt."""
    copies: int = 1
    """The number of such caches in an engine: one for each copy of the attention layers."""

    @property
    def samples(self) -> float:
        """The number of samples of full length that the engine holds."""
        return self.copies * max(0, self.room) / (self.per_token * self.sample)


def cache_of(facts: ModelFacts, config: RunConfig, memory: int) -> Cache:
    rollout = config.rollout
    weights = _engine_weights(facts, config)
    room = int(rollout.gpu_memory_utilization * memory) - weights - ENGINE_WORK
    if rollout.kv_cache_gb is not None:
        room = min(int(rollout.kv_cache_gb * GIB), memory - weights - ENGINE_WORK)
    width = FP8 if rollout.kv_cache_dtype.startswith("fp8") else width_of(config)
    return Cache(
        room,
        facts.kv_per_token_of(rollout.tensor_parallel_size) * width,
        config.data.max_prompt_length + rollout.max_completion_length,
        rollout.data_parallel_size,
    )


def _engine_weights(facts: ModelFacts, config: RunConfig) -> int:
    """The bytes of weights on each GPU of an engine: experts are spread over all of them, the rest over those of a copy."""
    rollout, whole = config.rollout, weight_bytes(facts, config.model)
    experts = whole * facts.experts // facts.num_params
    return (whole - experts) // rollout.tensor_parallel_size + experts // rollout.engine_size


def engine_need(facts: ModelFacts, config: RunConfig, memory: int) -> Need:
    """The GPU of an engine, with the cache of one sample of full length."""
    cache = cache_of(facts, config, memory)
    one = cache.per_token * cache.sample
    weights = _engine_weights(facts, config)
    room = cache.room + weights + ENGINE_WORK
    parts = {"weights": weights, "one sample of full length": one, "work": ENGINE_WORK}
    return Need("each engine", sum(parts.values()), room, parts)


def needs(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int) -> list[Need]:
    """What each kind of GPU of a run has to hold."""
    found = [] if kind in EVAL_ALONE else [learner_need(facts, config, memory)]
    if isinstance(config, RunConfig) and kind != "replay":
        found.append(engine_need(facts, config, memory))
    return found


def fits_gpus(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int) -> bool:
    if isinstance(config, RunConfig) and _takes_turns(config, kind) and not config.engines_match_learners:
        return False
    return all(need.fits for need in needs(facts, config, kind, memory))


def host_memory(facts: ModelFacts, config: RunConfig | SftConfig, kind: str) -> dict[str, int]:
    """The bytes of a node's host memory, by part, with up to eight GPUs a node: the larger of loading and of a turn."""
    learner, whole = config.learner, weight_bytes(facts, config.model)
    ranks = 0 if kind in EVAL_ALONE else min(learner.num_actors, GPUS_OF_NODE)
    parts = {"libraries": ranks * HOST_BASE}
    if ranks:
        copies = LOADED if learner.zero_stage == 3 else ranks
        parts["loading"] = int(copies * whole)
        parts["states"] = ranks * _states_on_host(facts, config)
        # The files are read before anything is moved here.
        parts[min("loading", "states", key=lambda name: parts[name])] = 0
    if isinstance(config, RunConfig):
        gpus = min(config.rollout.num_actors * config.rollout.engine_size, GPUS_OF_NODE)
        parts["libraries"] += gpus * HOST_BASE
        if kind not in EVAL_ALONE and config.rollout.keep_routing:
            parts["experts of samples"] = route_memory(facts, config)
        if config.colocated:
            parts["weights of engines asleep"] = gpus * _engine_weights(facts, config)
    return parts


def _states_on_host(facts: ModelFacts, config: RunConfig | SftConfig) -> int:
    """The bytes of one rank's states that are on the host, at least for a turn."""
    found = learner_memory(facts, config, on_gpu=True)
    if isinstance(config, RunConfig) and config.colocated:
        return found.weights + found.optimizer + found.reference + FP32 * facts.num_params // config.learner.num_actors
    if not (config.learner.offload_optimizer or config.learner.offload_params):
        return 0
    learner = config.learner.model_copy(update={"offload_optimizer": False, "offload_params": False})
    kept = learner_memory(facts, cast(Any, config.model_copy(update={"learner": learner})), on_gpu=True)
    return kept.weights - found.weights + kept.optimizer - found.optimizer


def fit_micro_batch(facts: ModelFacts, config: Config, memory: int) -> Config:
    """The config with the largest micro-batch that fits, of 32,768, 16,384, .. tokens; at the least one sample of full length."""
    longest, found = shortest(config), config
    for tokens in micro_batches(longest, MOST_TOKENS):
        found = with_tokens(config, tokens)
        if learner_need(facts, found, int((1 - MARGIN) * memory)).fits:
            break
    return found


def proposal(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int) -> dict[str, Any]:
    """Overrides with which the run would fit, as few as possible and those first that cost least. Empty: there are none."""
    found: dict[str, Any] = {}
    for options in _steps(config, kind):
        found |= options
        if _would_fit(facts, config, kind, memory, found):
            return _matched(config, kind, _fewest(facts, config, kind, memory, found))
    return {}


def _matched(config: RunConfig | SftConfig, kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """These overrides, and as many engines as share the GPUs of all learner ranks, where they take turns."""
    changed = _with(config, options)
    if not _takes_turns(config, kind) or not isinstance(changed, RunConfig) or changed.engines_match_learners:
        return dict(options)
    return {**options, "rollout.num_actors": changed.learner.num_actors // changed.rollout.engine_size}


def _takes_turns(config: RunConfig | SftConfig, kind: str) -> bool:
    return isinstance(config, RunConfig) and config.colocated and kind not in ONE_ROLE


def _fewest(
    facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int, found: dict[str, Any]
) -> dict[str, Any]:
    """The overrides without those that nothing depends on, the costly ones left out first."""
    for key in reversed(list(found)):
        less = {k: v for k, v in found.items() if k != key}
        if less and _would_fit(facts, config, kind, memory, less):
            found = less
    return found


def _would_fit(
    facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int, options: Mapping[str, Any]
) -> bool:
    changed = _with(config, _matched(config, kind, options))
    return changed is not None and fits_gpus(facts, changed, kind, int((1 - MARGIN) * memory))


def _with(config: Config, options: Mapping[str, Any]) -> Config | None:
    """The config with these options; None where the schema refuses them together."""
    data = config.model_dump(mode="json")
    for key, value in options.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    try:
        return cast(Config, type(config).model_validate(data))
    except ValueError:
        return None


def _steps(config: RunConfig | SftConfig, kind: str) -> Iterator[dict[str, Any]]:
    """Overrides that take less memory, one after the other, all of them kept."""
    learner = config.learner
    if kind not in EVAL_ALONE:
        if not config.model.checkpoints(on_gpu=True):
            yield {"model.gradient_checkpointing": True}
        for tokens in micro_batches(shortest(config), learner.micro_batch_tokens // 2):
            if tokens < learner.micro_batch_tokens:
                yield {"learner.micro_batch_tokens": tokens}
        if learner.zero_stage < 2:
            yield {"learner.zero_stage": 2}
        if learner.zero_stage < 3 and learner.num_actors > 1:
            yield {"learner.zero_stage": 3}
    if isinstance(config, RunConfig):
        yield from _steps_of_engines(config)
    if kind not in EVAL_ALONE:
        yield from _steps_of_ranks(config)


def _steps_of_engines(config: RunConfig) -> Iterator[dict[str, Any]]:
    if config.rollout.kv_cache_gb is None and config.rollout.gpu_memory_utilization < 0.9:
        yield {"rollout.gpu_memory_utilization": 0.9}
    for size in (2, 4, 8):
        if size > config.rollout.tensor_parallel_size:
            yield {"rollout.tensor_parallel_size": size}


def _steps_of_ranks(config: RunConfig | SftConfig) -> Iterator[dict[str, Any]]:
    learner = config.learner
    together = isinstance(config, RunConfig) and config.colocated
    ranks = learner.num_actors * 2
    while ranks <= MOST_RANKS:
        yield {"learner.num_actors": ranks, "learner.zero_stage": 3}
        ranks *= 2
    if not learner.offload_optimizer and not together:
        yield {"learner.offload_optimizer": True}
    size = learner.sequence_parallel_size * 2
    while size <= GPUS_OF_NODE:
        yield {"learner.sequence_parallel_size": size}
        size *= 2
