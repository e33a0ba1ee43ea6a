"""The defaults of placement: how many workers a run has, and what each asks for, where the recipe leaves it open.

    (what there is, config) -> config

What a recipe sets is kept. The rest is chosen:

    GPUs, on-policy     an engine and a learner rank on each, in turns
    GPUs, off-policy    half of them for learner ranks; one GPU alone is shared by both
    CPUs                an engine for every four cores, one learner rank
    CPUs of a worker    1 each; where they don't suffice, none for reward workers, then less for the others

A CPU here is what Ray counts. Threads may be more or fewer: see rollout.num_threads and learner.num_threads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, TypeVar, cast

from actors.cluster import Demand, beyond, demands, missing
from actors.machines import Machine
from grpo_ray.config.environment import ENVIRONMENT_POOL
from grpo_ray.config.reward import SHARED_POOL
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.labels import fits

Config = TypeVar("Config", bound=RunConfig | SftConfig)

CORES_PER_ENGINE = 4
MOST_ENGINES_ON_CPU = 8
MOST_REWARD_WORKERS = 8
CPU_SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)
"""The CPUs of an engine and of a learner rank; the first that fits is taken."""
SHARED_MEMORY_UTILIZATION = 0.4
"""The memory utilization of an engine whose GPU holds a learner rank all the time."""

UNUSED = {
    "replay": ("rollout", "reward", ENVIRONMENT_POOL),
    "eval": ("learner",),
    "sample": ("learner",),
}
"""Kind of run -> the sections of its recipe whose workers it does not start."""

NUM_CPUS = ("reward.num_cpus", "learner.num_cpus", "rollout.num_cpus")
NUM_ACTORS = ("reward.num_actors", "rollout.num_actors", "learner.num_actors")
NUM_GPUS = ("rollout.num_gpus", "learner.num_gpus")
PLACEMENT = "cluster.placement"
UTILIZATION = "rollout.gpu_memory_utilization"
CHOSEN = (*NUM_ACTORS, *NUM_CPUS, PLACEMENT, *NUM_GPUS, UTILIZATION)
"""The options that are chosen where a recipe does not set them."""
TENSOR_PARALLEL = "rollout.tensor_parallel_size"


def open_options(config: RunConfig | SftConfig) -> frozenset[str]:
    """The options of CHOSEN that nobody has set."""
    return frozenset(key for key in CHOSEN if _has(config, key) and not _is_named(config, key))


def fit_to(machine: Machine, config: Config, kind: str) -> tuple[Config, dict[str, Any]]:
    """The config with what it leaves open chosen for this machine, and the choices. Where nothing fits it is unchanged.

    Args:
        kind: the kind of run, e.g. `grpo` or `eval`: roles that it does not start take nothing.
    """
    return _fitted(machine, config, kind, open_options(config))


def would_fit(machine: Machine, config: Config, kind: str) -> dict[str, Any]:
    """The values of options set by a recipe with which a run that does not fit would, as few as possible. Empty: there are none."""
    free = open_options(config)
    groups: list[tuple[str, ...]] = [(key,) for key in (*NUM_CPUS, *NUM_ACTORS)]
    groups += [NUM_CPUS, NUM_ACTORS, (*NUM_CPUS, *NUM_ACTORS)]
    groups.append((*NUM_ACTORS, *NUM_CPUS, *NUM_GPUS, PLACEMENT, TENSOR_PARALLEL))
    for group in groups:
        opened = [k for k in group if _has(config, k) and k not in free and _section(k) not in UNUSED.get(kind, ())]
        found, _ = _fitted(machine, config, kind, free | set(opened))
        if opened and _is_placed(machine, found, kind):
            return {key: value for key in opened if (value := _get(found, key)) != _get(config, key)}
    if not isinstance(config, RunConfig):
        return {}
    idle = {f.title: f.workers.model_copy(update={"num_cpus": 0}) for f in config.reward.functions if f.workers}
    functions = tuple(f.model_copy(update={"workers": idle.get(f.title)}) for f in config.reward.functions)
    idle_config = with_options(config, {"reward.functions": functions})
    if not idle or not _is_placed(machine, _fitted(machine, idle_config, kind, free)[0], kind):
        return {}
    return {f"workers.num_cpus of the reward {title}": 0 for title in idle}


def too_small(machine: Machine, config: Config, kind: str, found: Config) -> str | None:
    """One line on what is asked for beyond what there is, and what would fit; None when everything fits.

    Args:
        config: the config as in the recipe.
        found: the same config, fitted.
    """
    if _is_placed(machine, found, kind):
        return None
    wanted = used(found, kind, gpus=machine.offers.get("GPU", 0) > 0)
    if (nowhere := _nowhere(machine, wanted)) is not None:
        return nowhere
    mend = would_fit(machine, config, kind)
    if mend:
        lacking = beyond(wanted, machine.offers) or "no node has room for one of its workers"
        return f"{lacking}. This would fit: {told(mend)}"
    each = " and ".join(f"a {d.option} worker of {_words(d.each)}" for d in wanted if d.each)
    return missing(wanted, machine.offers) or f"no nodes have room for {each}"


def _nowhere(machine: Machine, wanted: Iterable[Demand]) -> str | None:
    """One line on labels and resources that no node has at all; None: each is on some node."""
    lines = []
    for demand in wanted:
        option = demand.option.partition("-")[0]
        if not any(fits(node.labels, demand.labels) for node in machine.nodes):
            labels = ", ".join(f"{key}: {value}" for key, value in demand.labels.items())
            lines.append(f"no node has the labels of {option}.labels {{{labels}}}")
        lines += [
            f"no node has the {name} of {option}.resources" for name in demand.resources if name not in machine.offers
        ]
    return (
        f"{'; '.join(dict.fromkeys(lines))}: leave them out, or join a cluster that has them (cluster.address)"
        if lines
        else None
    )


def told(options: Mapping[str, Any]) -> str:
    """The options as overrides: `rollout.num_cpus=0.5 reward.num_cpus=0`."""
    return " ".join(f"{key}={_word(value)}" for key, value in options.items())


def used(config: RunConfig | SftConfig, kind: str, *, gpus: bool) -> list[Demand]:
    """Demands of the workers that this kind of run starts, on a cluster with GPUs or without."""
    idle = UNUSED.get(kind, ())
    return [d for d in demands(config, gpus) if d.option.partition("-")[0] not in idle]


def _fitted(machine: Machine, config: Config, kind: str, free: Collection[str]) -> tuple[Config, dict[str, Any]]:
    alone = alone_options(config, kind, gpus=machine.offers.get("GPU", 0) > 0)
    config = with_options(config, alone)
    for options in _candidates(machine, config, kind, free):
        found = with_options(config, options)
        if _is_placed(machine, found, kind):
            return found, alone | options
    return config, alone


def alone_options(config: RunConfig | SftConfig, kind: str, *, gpus: bool) -> dict[str, Any]:
    """The options by which engines, or learners, that share GPUs with nobody in this kind of run get whole ones."""
    shares = gpus and isinstance(config, RunConfig) and config.colocated
    return {PLACEMENT: "disaggregated"} if shares and kind in UNUSED else {}


def _candidates(
    machine: Machine, config: RunConfig | SftConfig, kind: str, free: Collection[str]
) -> Iterator[dict[str, Any]]:
    """The choices for what is left open, the best first."""
    reward = isinstance(config, RunConfig) and SHARED_POOL in config.reward_pools
    shares = CPU_SHARES if _may_share(machine, config, free) else CPU_SHARES[:1]
    for counts in _counts(machine, config, kind, free):
        for share, of_rewards in product(shares, (1.0, 0.0) if reward else (None,)):
            if share < 1 and of_rewards:
                continue
            options = dict(counts)
            options["learner.num_cpus"] = share
            if isinstance(config, RunConfig):
                options["rollout.num_cpus"] = share
            if of_rewards is not None:
                options["reward.num_cpus"] = of_rewards
                options["reward.num_actors"] = _reward_workers(machine, config)
            idle = UNUSED.get(kind, ())
            yield {key: value for key, value in options.items() if key in free and _section(key) not in idle}


def _may_share(machine: Machine, config: RunConfig | SftConfig, free: Collection[str]) -> bool:
    """Whether engines and learner ranks may ask for less than a CPU: those on GPUs, and one of each on CPUs; more of them than
    cores only the user may ask for."""
    several = [
        key
        for key in ("rollout.num_actors", "learner.num_actors")
        if _has(config, key) and key not in free and _get(config, key) > 1
    ]
    return machine.offers.get("GPU", 0) > 0 or not several


def _reward_workers(machine: Machine, config: RunConfig | SftConfig) -> int:
    assert isinstance(config, RunConfig)
    number = max(1, min(MOST_REWARD_WORKERS, _cores(machine) // CORES_PER_ENGINE))
    return _within(number, config.reward.min_actors, config.reward.max_actors)


def _counts(
    machine: Machine, config: RunConfig | SftConfig, kind: str, free: Collection[str]
) -> Iterator[dict[str, Any]]:
    """The numbers of engines and learner ranks, and how they share devices, in decreasing order."""
    learner = config.learner
    if not isinstance(config, RunConfig):
        gpus = machine.gpus_of(learner.resources, learner.labels)
        for number in _fewer(gpus):
            yield {"learner.num_actors": _learners(config, number)}
        return
    if "rollout" in UNUSED.get(kind, ()):
        for number in _fewer(machine.gpus_of(learner.resources, learner.labels)):
            yield {"learner.num_actors": _learners(config, number), PLACEMENT: "disaggregated"}
        return
    rollout = config.rollout
    tensor = 1 if TENSOR_PARALLEL in free else rollout.tensor_parallel_size
    size = tensor * rollout.data_parallel_size
    bare = {key: None for key in NUM_GPUS if key in free} | {TENSOR_PARALLEL: tensor}
    gpus = machine.gpus_of(rollout.resources, rollout.labels)
    if not gpus:
        engines = max(1, min(MOST_ENGINES_ON_CPU, _cores(machine) // CORES_PER_ENGINE))
        for number in _fewer(engines):
            yield bare | {"rollout.num_actors": _engines(config, number), "learner.num_actors": _learners(config, 1)}
        return
    if "learner" in UNUSED.get(kind, ()):
        for number in _fewer(gpus // size):
            yield bare | {"rollout.num_actors": _engines(config, number), PLACEMENT: "disaggregated"}
        return
    for number in _fewer(gpus):
        yield from _on_gpus(machine, config, free, number, size, bare)


def _on_gpus(
    machine: Machine, config: RunConfig, free: Collection[str], gpus: int, size: int, bare: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    rollout, learner = config.rollout, config.learner
    engines = None if "rollout.num_actors" in free else rollout.num_actors
    learners = None if "learner.num_actors" in free else learner.num_actors
    own_gpus = all(key in free or _get(config, key) is None for key in NUM_GPUS)
    may_take_turns = (
        (size == 1 or (PLACEMENT not in free and rollout.data_parallel_size == 1))
        and own_gpus
        and config.algorithm.max_staleness == 0
        and rollout.max_actors is None
        and rollout.labels == learner.labels
        and (engines is None or learners is None or engines * size == learners)
        and (PLACEMENT in free or config.colocated)
    )
    in_turns = {}
    if may_take_turns:
        most = min(gpus // size, config.prompts_per_step)
        number = engines or (learners or _learners(config, most * size)) // size
        in_turns = {**bare, "rollout.num_actors": number, "learner.num_actors": number * size, PLACEMENT: "colocated"}
        if PLACEMENT not in free or (engines is None and learners is None):
            yield in_turns
    if PLACEMENT in free or not config.colocated:
        both = min(gpus, machine.gpus_of(learner.resources, learner.labels))
        half = learners or _learners(config, max(1, min(both // 2, gpus - size * (engines or 1))))
        rest = engines or _engines(config, max(1, (gpus - half) // size))
        apart = {**bare, "rollout.num_actors": rest, "learner.num_actors": half, PLACEMENT: "disaggregated"}
        yield apart
        if gpus == 1 and size == 1 and all(not _is_named(config, key) for key in NUM_GPUS):
            yield apart | {"rollout.num_gpus": 0.5, "learner.num_gpus": 0.5, UTILIZATION: SHARED_MEMORY_UTILIZATION}
    if in_turns:
        yield in_turns


def _learners(config: RunConfig | SftConfig, number: int) -> int:
    """The number of learner ranks: at most `number`, and no more than there is work for; sequence_parallel_size divides it."""
    size = config.learner.sequence_parallel_size
    samples = (
        config.prompts_per_step * config.rollout.num_generations
        if isinstance(config, RunConfig)
        else config.examples_per_step
    )
    return size * max(1, min(number // size, samples))


def _engines(config: RunConfig, number: int) -> int:
    return _within(min(number, config.prompts_per_step), config.rollout.min_actors, config.rollout.max_actors)


def _within(number: int, low: int | None, high: int | None) -> int:
    return max(low or number, min(high or number, number))


def _cores(machine: Machine) -> int:
    counted = int(min(machine.offers.get("CPU", 0), machine.free.get("CPU", float("inf"))))
    return counted if machine.cores is None else min(counted, machine.cores)


def _fewer(number: int) -> Iterator[int]:
    """number, half of it, .. 1."""
    number = max(1, number)
    while number > 1:
        yield number
        number //= 2
    yield 1


def _is_placed(machine: Machine, config: RunConfig | SftConfig, kind: str) -> bool:
    """Whether each worker finds a node, trying the largest first, each on the first node that has room."""
    has_gpus = machine.offers.get("GPU", 0) > 0
    wanted = used(config, kind, gpus=has_gpus)
    if missing(wanted, machine.offers) is not None:
        return False
    if isinstance(config, RunConfig) and config.colocated and has_gpus and "learner" not in UNUSED.get(kind, ()):
        if not config.engines_match_learners:
            return False
        size = config.rollout.engine_size
        engine, learner = (next(d for d in wanted if d.option == option) for option in ("rollout", "learner"))
        rest = [d for d in wanted if d not in (engine, learner)]
        each = dict(engine.each)
        for name, amount in learner.each.items():
            each[name] = each.get(name, 0) + size * amount
        items = [(engine.labels, each | {"GPU": float(size)})] * engine.num_actors
        items += [(d.labels, d.each) for d in rest for _ in range(d.num_actors)]
    else:
        items = [(d.labels, d.each) for d in wanted for _ in range(d.num_actors)]
    left = [dict(n.offers) for n in machine.nodes]
    for labels, each in sorted(items, key=lambda item: (-item[1].get("GPU", 0), -item[1].get("CPU", 0))):
        for node, room in zip(machine.nodes, left, strict=True):
            if fits(node.labels, labels) and all(room.get(k, 0) + 1e-9 >= v for k, v in each.items()):
                for name, amount in each.items():
                    room[name] -= amount
                break
        else:
            return False
    return True


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """The config with these options, all as if they had been set by the user."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        section, _, name = key.partition(".")
        by_section.setdefault(section, {})[name] = value
    sections = {s: getattr(config, s).model_copy(update=values) for s, values in by_section.items()}
    return cast(Config, config.model_copy(update=sections))


def _has(config: RunConfig | SftConfig, key: str) -> bool:
    """Whether this kind of config has the option and a run of it uses it."""
    section, _, name = key.partition(".")
    if section == "reward" and isinstance(config, RunConfig) and SHARED_POOL not in config.reward_pools:
        return False
    if key == PLACEMENT and not isinstance(config, RunConfig):
        return False
    return section in type(config).model_fields and name in type(getattr(config, section)).model_fields


def _is_named(config: RunConfig | SftConfig, key: str) -> bool:
    section, _, name = key.partition(".")
    return section in config.model_fields_set and name in getattr(config, section).model_fields_set


def _get(config: RunConfig | SftConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _section(key: str) -> str:
    return key.partition(".")[0]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _words(each: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in each.items())
