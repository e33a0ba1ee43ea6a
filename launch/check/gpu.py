"""The lines of `check` on GPUs: what each holds, how many samples an engine's cache has room for, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from actors.cluster import demands
from actors.machines import Machine, Node
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError, ResourceError
from grpo_ray.models.memory.estimate import ModelFacts, facts_of, gib, known_facts
from grpo_ray.models.memory.gpu_fit import GPUS_OF_NODE, cache_of, host_memory, needs
from grpo_ray.pipeline.plan import Plan, Stage
from launch.check.model import ModelFiles, learners_model
from launch.run.gpus import parse_gpus
from launch.run.placement import fitted, would_fit_gpus

CPUS_OF_GPU = 16
"""The CPUs that a node is taken to have for each of its GPUs."""


@dataclass(frozen=True)
class Gpus:
    """What `--gpu` stands for."""

    told: str
    machine: Machine


def named_gpus(text: str, config: RunConfig | SftConfig) -> Gpus:
    """The GPUs that a user names, by default as many as the config asks for, on nodes of up to eight.

    Raises:
        ConfigError: no GPU has that name, or it can't compute in the model's dtype.
    """
    number, gpu = parse_gpus(text)
    if config.model.dtype == "bfloat16" and not gpu.has_bf16:
        raise ConfigError(
            f"a {gpu.name} has no bfloat16, which model.dtype is; set model.dtype=float32, or take another GPU"
        )
    if number is None:
        number = max(1, ceil(sum(d.num_actors * d.each.get("GPU", 0.0) for d in demands(config, gpus=True))))
    sizes = [min(GPUS_OF_NODE, number - start) for start in range(0, number, GPUS_OF_NODE)]
    nodes = tuple(Node(size * CPUS_OF_GPU, size) for size in sizes)
    return Gpus(f"{number} x {gpu.name}", Machine(nodes, gpu_memory=gpu.memory))


def gpu_rows(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int) -> Iterator[tuple[str, str]]:
    """The plan's lines on GPUs of so much memory."""
    for number, need in enumerate(needs(facts, config, kind, memory)):
        yield ("" if number else "gpu", str(need))
    if isinstance(config, RunConfig) and kind != "replay":
        cache = cache_of(facts, config, memory)
        of_copies = f" in {cache.copies} copies of {gib(max(0, cache.room))}" if cache.copies > 1 else ""
        yield (
            "cache",
            f"each engine {gib(cache.copies * max(0, cache.room))}{of_copies}, {cache.samples:,.1f} samples of full length "
            f"({cache.sample:,} tokens of {cache.per_token:,} bytes)",
        )
        if 1 <= cache.samples < config.rollout.max_num_seqs:
            yield (
                "warning",
                f"rollout.max_num_seqs is {config.rollout.max_num_seqs}, and the cache holds {cache.samples:,.0f} samples of full "
                "length: where so many are long, vLLM computes some of them again; lower it, or raise "
                "rollout.tensor_parallel_size",
            )
    host = host_memory(facts, config, kind)
    parts = ", ".join(f"{name} {gib(n)}" for name, n in host.items() if n)
    yield ("host", f"{gib(sum(host.values()))} on a node of {GPUS_OF_NODE} GPUs ({parts})")


def check_gpus(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int, what: str) -> None:
    """Raises ResourceError where a part of the run does not fit its GPU, with overrides with which it would."""
    beyond = [need for need in needs(facts, config, kind, memory) if not need.fits]
    if beyond:
        would = would_fit_gpus(facts, config, kind, memory)
        raise ResourceError(f"{what}: too little memory: {'; '.join(map(str, beyond))}. {would}")


def stage_rows(recipe: str, overrides: list[str], gpu: str) -> Iterator[tuple[str, str]]:
    """The stages of a pipeline that load models, each with what its GPUs hold.

    Raises:
        ConfigError: no GPU has that name.
        ResourceError: a stage does not fit; with overrides of its config with which it would.
    """
    from launch.pipeline.stages import load_plan

    plan = load_plan(recipe, overrides, imports=False, on_other_gpus=True)
    made: dict[str, ModelFacts | None] = {}
    for stage in plan.stages:
        config = plan.config_of(stage)
        if isinstance(config, RunConfig | SftConfig):
            name = config.model.path or stage.name
            if name not in made:
                made[name] = _facts(config)
            facts = made[name]
            made |= dict.fromkeys(_models_of(plan, stage), facts)
            yield (stage.name, _stage_told(stage, config, facts, gpu))


def _models_of(plan: Plan, stage: Stage) -> list[str]:
    """The models that a stage makes."""
    return [str(plan.output(stage.name, output)) for output in stage.spec.outputs if output == "model"]


def _stage_told(stage: Stage, config: RunConfig | SftConfig, facts: ModelFacts | None, gpu: str) -> str:
    kind, gpus = str(stage.spec.run), named_gpus(gpu, config)
    memory = gpus.machine.gpu_memory
    if facts is None or memory is None:
        return f"nothing is said of it, for {config.model.path} is neither here nor to be had from the hub now"
    found, _ = fitted(config, gpus.machine, gpus.told, kind, may_grow=True, strict=False)
    check_gpus(facts, found, kind, memory, f"stage {stage.name} on {gpus.told}")
    return "; ".join(str(need) for need in needs(facts, found, kind, memory))


def _facts(config: RunConfig | SftConfig) -> ModelFacts | None:
    known = known_facts(config.model)
    if known is not None:
        return known
    try:
        with learners_model(config, on_gpu=True) as model:
            return facts_of(ModelFiles(config.model).config, model().num_params)
    except ConfigError:
        return None
