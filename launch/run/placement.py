"""The resources available to a run, and the numbers of workers that fit them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from actors.cluster import connect, joins
from actors.control.colocated import check_colocated
from actors.machines import Machine, Node
from actors.placement_defaults import fit_to, open_options, told, too_small, with_options, would_fit
from grpo_ray.config.rollout import LARGE_GPU_BYTES
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.config.yaml import dump_yaml
from grpo_ray.errors import ResourceError
from grpo_ray.machine import free_memory, usable_cpus
from grpo_ray.models.memory.estimate import ModelFacts, known_facts
from grpo_ray.models.memory.fit import MARGIN, fit_memory, too_large, unfitted_micro_batch
from grpo_ray.models.memory.gpu_fit import fit_micro_batch, needs, proposal
from launch.console import plain_console
from launch.run.gpus import smallest

Config = TypeVar("Config", bound=RunConfig | SftConfig)
console = plain_console(soft_wrap=True)
ENGINES = "rollout.num_actors"
SEQS = "rollout.max_num_seqs"
SEQS_ON_LARGE_GPUS = 1024
"""What vLLM's own server takes there. With 256, models of up to 3B parameters leave half of such a GPU idle."""
CHECKPOINTING, MICRO_BATCH = "model.gradient_checkpointing", "learner.micro_batch_tokens"
OF_KIND = "accelerator_type:"
"""Ray's resource of a node with GPUs, before their name."""
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""The device files, one of which exists where there may be a GPU."""


def settled(config: Config, kind: str) -> Config:
    """The config with what the recipe leaves open chosen for the machine or the cluster; the choices are printed. It joins
    the cluster, where there is one.

    Raises:
        ResourceError: what the recipe asks for can't fit; with what would.
    """
    if joins(config):
        connect(config)
    machine = machine_of(config)
    found, chosen = fitted(config, machine, where(config), kind, may_grow=joins(config))
    if said := chosen_told(chosen):
        console.print(f"chosen for {where(config)} ({offers_told(machine)}): {said}")
    return found


def fitted(
    config: Config, machine: Machine, place: str, kind: str, *, may_grow: bool = False, strict: bool = True
) -> tuple[Config, dict[str, Any]]:
    """The config with what it leaves open fitted, and what was chosen.

    Args:
        may_grow: nodes may still be joining, or an autoscaler adds them: see `await_resources`, which waits.
        strict: refuse what GPUs have too little memory for.

    Raises:
        ConfigError: engines and learners can't share GPUs as the recipe asks.
        ResourceError: what the recipe asks for can't fit; with what would.
    """
    found, chosen = fit_to(machine, config, kind)
    if (lacking := too_small(machine, config, kind, found)) is not None and not may_grow:
        raise ResourceError(f"{place} is too small: {lacking}")
    if isinstance(found, RunConfig):
        check_colocated(found, has_gpus=machine.offers.get("GPU", 0) > 0)
    found, chosen = fit_to_large_gpus(machine, found, chosen)
    return fit_to_memory(machine, found, chosen, kind, strict=strict)


def fit_to_large_gpus(machine: Machine, config: Config, chosen: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The config with the sequences that an engine samples at once for large GPUs, where it leaves them open."""
    large = (machine.gpu_memory or 0) >= LARGE_GPU_BYTES
    if not large or not isinstance(config, RunConfig) or "max_num_seqs" in config.rollout.model_fields_set:
        return config, chosen
    more = {SEQS: SEQS_ON_LARGE_GPUS}
    return with_options(config, more), chosen | more


def fit_to_memory(
    machine: Machine, config: Config, chosen: dict[str, Any], kind: str, *, strict: bool = True
) -> tuple[Config, dict[str, Any]]:
    """The config with what it leaves open fitted to the memory of this machine or of its GPUs, and all that was chosen. Where the
    memory or the model is not known it gets the defaults.

    Raises:
        ResourceError: nothing fits; with how much each takes.
    """
    if kind in ("eval", "sample"):
        return _fit_to_host(machine, config, chosen, kind)
    on_gpu = bool(machine.offers.get("GPU")) and config.learner.num_gpus != 0
    more: dict[str, Any] = {}
    found = config
    if config.model.gradient_checkpointing == "auto":
        found = with_options(found, {CHECKPOINTING: on_gpu})
        more = {CHECKPOINTING: True} if on_gpu else {}
    if on_gpu:
        found = _fit_to_gpu(machine, found, kind, strict=strict)
    else:
        found, chosen = _fit_to_host(machine, found, chosen, kind)
    if found.learner.micro_batch_tokens != config.learner.micro_batch_tokens:
        more[MICRO_BATCH] = found.learner.micro_batch_tokens
    return found, chosen | more


def _fit_to_gpu(machine: Machine, config: Config, kind: str, *, strict: bool) -> Config:
    facts, memory = known_facts(config.model), machine.gpu_memory
    if facts is None or memory is None:
        return unfitted_micro_batch(config)
    found = fit_micro_batch(facts, config, memory) if config.learner.micro_batch_is_open else config
    # An estimate may be wrong by so much.
    beyond = [need for need in needs(facts, found, kind, int((1 + MARGIN) * memory)) if not need.fits]
    if strict and beyond:
        raise ResourceError(
            f"the GPUs are too small: {'; '.join(map(str, beyond))}. {would_fit_gpus(facts, found, kind, memory)}"
        )
    return found


def would_fit_gpus(facts: ModelFacts, config: RunConfig | SftConfig, kind: str, memory: int) -> str:
    """A sentence with the overrides with which a run would fit GPUs of so much memory."""
    mend = proposal(facts, config, kind, memory)
    return f"This would fit: {told(mend)}" if mend else "No override is known with which it would; take a smaller model"


def _fit_to_host(machine: Machine, config: Config, chosen: dict[str, Any], kind: str) -> tuple[Config, dict[str, Any]]:
    facts = known_facts(config.model)
    if facts is None or joins(config) or machine.offers.get("GPU"):
        return unfitted_micro_batch(config), chosen
    free = free_memory()
    found = fit_memory(facts, config, kind, free, engines_are_open=ENGINES in chosen)
    if (lacking := too_large(facts, found, kind, free)) is not None:
        raise ResourceError(f"this machine is too small: {lacking}")
    if isinstance(found, RunConfig) and ENGINES in chosen:
        chosen = chosen | {ENGINES: found.rollout.num_actors}
    return found, chosen


def machine_of(config: RunConfig | SftConfig) -> Machine:
    """The joined cluster, else this machine."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        cores = usable_cpus()
        return Machine((Node(config.cluster.num_cpus or cores, num_gpus()),), cores=cores, gpu_memory=gpu_memory())
    nodes = tuple(
        Node(offers.pop("CPU", 0.0), offers.pop("GPU", 0.0), offers, node["Labels"])
        for node in ray.nodes()
        if node["Alive"]
        for offers in [dict(node["Resources"])]
    )
    free = ray.available_resources()
    kinds = {
        name.removeprefix(OF_KIND) for node in nodes if node.gpus for name in node.resources if name.startswith(OF_KIND)
    }
    gpu = smallest(kinds)
    return Machine(
        nodes,
        free={name: free.get(name, 0.0) for name in ("CPU", "GPU")},
        gpu_memory=None if gpu is None else gpu.memory,
    )


def gpu_memory() -> int | None:
    """The bytes of the smallest GPU of this machine; None where there is none."""
    if not num_gpus():
        return None
    import torch

    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def num_gpus() -> int:
    """The number of GPUs of this machine. torch, which takes seconds to load, is asked only where there may be one."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count()


def where(config: RunConfig | SftConfig) -> str:
    return (
        f"the cluster at {config.cluster.address}"
        if config.cluster.address
        else ("the cluster" if joins(config) else "this machine")
    )


def offers_told(machine: Machine) -> str:
    offers = machine.offers
    return f"{offers.get('CPU', 0):g} CPUs, {offers.get('GPU', 0):g} GPUs"


def chosen_told(chosen: Mapping[str, Any]) -> str:
    """The choices, as the overrides that would set them."""
    return told({key: value for key, value in chosen.items() if value is not None})


def with_mend(error: ResourceError, config: RunConfig | SftConfig, kind: str, run_dir: Path) -> ResourceError:
    """The error of a cluster that has stayed too small for a run, with what would fit, in the run's own file where it has one."""
    mend = would_fit(machine_of(config), config, kind)
    if not mend:
        return error
    file = run_dir / "config.yaml"
    return ResourceError(f"{error}. This would fit{f', in {file}' if file.is_file() else ''}: {told(mend)}")


def open_yaml(config: RunConfig | SftConfig) -> str:
    """The config without what it leaves open: for another machine, which chooses."""
    data: dict[str, Any] = config.model_dump(mode="json")
    fitted_too = {"learner": "micro_batch_tokens", "rollout": "max_num_seqs"}
    left_open = [
        f"{section}.{name}"
        for section, name in fitted_too.items()
        if section in data and name not in getattr(config, section).model_fields_set
    ]
    for key in (*open_options(config), *left_open):
        section, _, name = key.partition(".")
        data[section] = {k: v for k, v in data[section].items() if k != name}
    return dump_yaml(data)
