"""The Ray cluster under a run: start or join one, and check that it has what the run asks for before waiting for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.addresses import VARIABLE, Address, bypass_proxies, check_answers, read_address
from actors.devices import gpus_of_new_node
from actors.named_clusters import check_named
from actors.private import is_closed, use_private_temporary_files, why_open
from actors.search_path import worker_env
from grpo_ray.config.common import ClusterConfig
from grpo_ray.config.environment import ENVIRONMENT_POOL, EnvironmentConfig
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.reward import RewardConfig
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ResourceError
from grpo_ray.labels import fits
from grpo_ray.machine import usable_cpus
from grpo_ray.plain_terminal import say
from grpo_ray.secrets import make_token, token_path

NAMESPACE = "grpo-ray"
CONTROLLER = "/controller"
COMMON: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
LOCAL_START_TRIES = 2
RAYS = "ray"
"""The folder of Ray's sessions in the one for temporary files, as Ray names it."""


class OnCluster(Protocol):
    """A config that names its cluster."""

    @property
    def cluster(self) -> ClusterConfig: ...


def connect(config: OnCluster) -> None:
    """Join `cluster.address`, or start a cluster on this machine; do nothing if this process has joined one.

    Raises:
        ConfigError: it is not an address, or not one that the user named.
        ResourceError: it does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "100000")
    # Its workers would have none of the environments that ours get, and be of no use.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    address = read_address(config.cluster.address)
    if address is not None:
        join(address)
    else:
        bypass_proxies([])
        env = worker_env(os.getcwd())
        _start_local(config.cluster.num_cpus or usable_cpus(), COMMON | {"runtime_env": env})


def joins(config: OnCluster) -> bool:
    """Whether the run joins a cluster that already runs and outlives this process."""
    return read_address(config.cluster.address) is not None


def join(address: Address) -> None:
    """Join the cluster at this address. Raises ConfigError: it is not an address, or not one that the user named. ResourceError:
    nothing answers there, or it refuses our token."""
    check_named(address)
    check_token()
    where = check_answers(address)
    import ray

    try:
        # Ray's client server takes no code before it knows the job.
        env = {} if address.where.startswith("ray://") else worker_env(os.getcwd())
        ray.init(address=where, runtime_env=env, **COMMON)
    except ray.exceptions.AuthenticationError as e:
        raise ResourceError(
            f"the Ray cluster at {address} does not take our token ({_first_line(e)}): it must be the one that its head was "
            "started with, in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        ) from None
    except (ConnectionError, ValueError, RuntimeError) as e:
        raise ResourceError(f"no run can join the Ray cluster at {address}: {_first_line(e)}") from None
    if (warning := open_session()) is not None:
        say(f"note: {warning}", error=True)


def open_session() -> str | None:
    """What another user of this machine can do to the node of the cluster that this process has joined; None: nothing."""
    import ray

    return None if ray.util.client.ray.is_connected() else open_folder(ray.get_runtime_context().get_temp_dir())


def open_folder(folder: str) -> str | None:
    """As `open_session`, for Ray's folder for temporary files on this machine."""
    if is_closed(folder):
        return None
    reason = why_open(f"{folder}/session_latest/runtime_resources") or f"every user can enter {folder}"
    return (
        f"Ray's sessions on this machine are open to its other users ({reason}), who can change the code that runs in them: start "
        "Ray by launch/plain/start_ray.sh, or with --temp-dir in a folder of mode 0700"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_token() -> None:
    """Check that there is a token for a cluster that already runs.

    Raises:
        ResourceError: there is none.
    """
    path = token_path(os.environ)
    if os.environ.get("RAY_AUTH_MODE") == "token" and not os.environ.get("RAY_AUTH_TOKEN") and not path.is_file():
        raise ResourceError(
            f"Ray's token is missing: neither RAY_AUTH_TOKEN nor {path} is there. Copy that file from the cluster's head "
            "(KubeRay: kubectl get secret CLUSTER -o jsonpath='{.data.auth_token}' | base64 -d), mode 0600; for a cluster "
            "that was started without a token set RAY_AUTH_MODE=disabled"
        )


CONTROLLER_LOG = "controller"
"""The name of the controller's log in the run's folder."""


def controller_name(run: str) -> str:
    return run + CONTROLLER


def _start_local(num_cpus: int, common: dict[str, Any]) -> None:
    """Start Ray, twice if need be: its own processes get 30 s, which a cold start can exceed; the second start finds warm files."""
    import ray

    place = use_private_temporary_files()
    if os.environ.get("RAY_AUTH_MODE", "token") == "token":
        make_token(os.environ)
    for left in reversed(range(LOCAL_START_TRIES)):
        try:
            with bare_node():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=gpus_of_new_node(),
                    include_dashboard=False,
                    _temp_dir=f"{place}/{RAYS}",
                    **common,
                )
            return
        except Exception as e:
            ray.shutdown()
            if not left:
                raise ResourceError(
                    f"Ray did not start on this machine in {LOCAL_START_TRIES} tries ({e}); is it very busy, or out of memory or "
                    f"disk? Its logs are in {place}/{RAYS}/session_latest/logs{_of_environment()}"
                ) from None


IDLE = ("start_monitor", "start_api_server", "start_log_monitor")
"""Ray's starts of the autoscaler, which has no nodes to add here, the dashboard's server, which serves no dashboard, and the
reader of logs, which has no receiver. Each is a process that takes seconds of a core, and Ray waits for the second of them."""


@contextmanager
def bare_node() -> Iterator[None]:
    """Inside, a Ray node that this process starts has no processes that stay idle in a run."""
    from ray._private.node import Node

    starting = {name: getattr(Node, name) for name in IDLE}
    for name in IDLE:
        setattr(Node, name, _start_nothing)
    try:
        yield
    finally:
        for name, start in starting.items():
            setattr(Node, name, start)


def _start_nothing(node: Any, **options: Any) -> None:
    pass


OWN_VARIABLES = (
    *("RAY_AUTH_MODE", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_agent_register_timeout_ms"),
    "RAY_prestart_worker_first_driver",
    *("RAY_CLIENT_MODE", "RAY_USAGE_STATS_ENABLED"),
)
"""The environment variables that are set here, and by Ray for itself."""


def _of_environment() -> str:
    """The names of the other variables that configure Ray; their values may be secret."""
    names = sorted(name for name in os.environ if name.startswith("RAY_") and name not in OWN_VARIABLES)
    return f"; of the environment it has {', '.join(names)}" if names else ""


def has_gpus() -> bool:
    """Whether any node of the cluster offers GPUs."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0)) > 0


def shares_devices(config: RunConfig, gpus: bool) -> bool:
    """Whether rollout engines and learner ranks take turns on the same devices: parts of one GPU, or more threads than this
    machine has cores."""
    rollout, learner = config.rollout, config.learner
    if config.colocated:
        return True
    if gpus:
        return any(part is not None and part % 1 > 0 for part in (rollout.num_gpus, learner.num_gpus))
    cores = usable_cpus()
    threads = learner.num_threads or (1 if learner.num_actors > 1 else cores)
    return rollout.num_actors * (rollout.num_threads or 1) + learner.num_actors * threads > cores


SHARED_GPU = 0.5
"""The share of a GPU that Ray counts for each of an engine and a learner rank that take turns on it."""


def gpus_per_engine(config: RunConfig, gpus: bool) -> float:
    rollout = config.rollout
    if rollout.num_gpus is not None or not gpus:
        return rollout.num_gpus or 0.0
    return rollout.engine_size * (SHARED_GPU if config.colocated else 1.0)


def gpus_per_learner(config: RunConfig | SftConfig, gpus: bool) -> float:
    if config.learner.num_gpus is not None or not gpus:
        return config.learner.num_gpus or 0.0
    return SHARED_GPU if isinstance(config, RunConfig) and config.colocated else 1.0


@dataclass(frozen=True)
class Demand:
    """What one kind of worker asks of the cluster."""

    option: str
    """The config section, e.g. `rollout`."""
    num_actors: int
    num_cpus: float
    """CPUs per actor."""
    num_gpus: float
    """GPUs per actor."""
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources per actor."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The labels of a node that may hold such an actor."""

    @property
    def each(self) -> dict[str, float]:
        """All resources that one actor takes, by Ray's names."""
        return {k: v for k, v in {"CPU": self.num_cpus, "GPU": self.num_gpus, **self.resources}.items() if v}


def demands(config: RunConfig | SftConfig, gpus: bool) -> list[Demand]:
    kinds: list[tuple[str, RolloutConfig | RewardConfig | EnvironmentConfig | LearnerConfig, float]] = [
        ("learner", config.learner, gpus_per_learner(config, gpus))
    ]
    if isinstance(config, RunConfig):
        rollout = config.rollout
        engines = ("rollout", rollout, gpus_per_engine(config, gpus))
        rewards = [(name, r, r.num_gpus) for name, r in config.reward_pools.items()]
        environments = [(ENVIRONMENT_POOL, config.environment, 0.0)] if config.environment is not None else []
        kinds = [engines, *rewards, *environments, *kinds]
    return [Demand(name, k.num_actors, k.num_cpus, n, k.resources, k.labels) for name, k, n in kinds]


def missing(wanted: list[Demand], offered: dict[str, float]) -> str | None:
    """One line that names what is asked for beyond what there is, and the fix; None when everything fits.

    It compares sums only: whether single nodes can hold single actors shows when they are placed.
    """
    lacking = beyond(wanted, offered)
    return lacking and (
        f"{lacking}. Lower num_actors, num_cpus or num_gpus of those, add nodes, or on this machine alone let more actors share "
        "its cores with cluster.num_cpus"
    )


def beyond(wanted: list[Demand], offered: dict[str, float]) -> str | None:
    """What is asked for beyond what there is; None: nothing."""
    lines = []
    for kind in dict.fromkeys(name for d in wanted for name in d.each):
        asked = sum(d.num_actors * d.each.get(kind, 0) for d in wanted)
        have = offered.get(kind, 0)
        if asked > have + 1e-9:
            parts = " + ".join(f"{d.option} {d.num_actors} x {d.each[kind]:g}" for d in wanted if kind in d.each)
            what = f"{kind}s" if kind in ("CPU", "GPU") else f"of the resource {kind}"
            lines.append(f"{asked:g} {what} are asked for ({parts}), {have:g} are there")
    return "; ".join(lines) or None


def misplaced(wanted: list[Demand], nodes: Iterable[Mapping[str, str]]) -> str | None:
    """One line on the first kind that no node may hold, by the labels of the nodes; None when each has one."""
    known = list(nodes)
    for demand in wanted:
        if not any(fits(labels, demand.labels) for labels in known):
            return f"no node has the labels of {demand.option}.labels, {dict(demand.labels)}: give them to one (ray start --labels)"
    return None


async def await_resources(wanted: list[Demand], deadline_s: float) -> None:
    """Wait until the cluster is large enough, since nodes may still be joining.

    Raises:
        ResourceError: what is missing after `deadline_s`; at once when no autoscaler or other node can add more.
    """
    import ray

    alone = len([n for n in ray.nodes() if n["Alive"]]) == 1 and not os.environ.get(VARIABLE)
    give_up = time.monotonic() + (0 if alone else deadline_s)
    asked = False
    try:
        while True:
            lacking = missing(wanted, ray.cluster_resources())
            if lacking is None:
                lacking = misplaced(wanted, [n["Labels"] for n in ray.nodes() if n["Alive"]])
            if lacking is None:
                return
            if time.monotonic() >= give_up:
                raise ResourceError(f"the cluster is too small: {lacking}")
            if not asked:
                import ray.autoscaler.sdk

                # An autoscaler adds nodes for what is asked for, and actors are placed only when all of them fit.
                ray.autoscaler.sdk.request_resources(
                    bundles=bundles(wanted),
                    bundle_label_selectors=[dict(d.labels) for d in wanted for _ in range(_num_bundles(d))],
                )
                asked = True
            await asyncio.sleep(0.5)
    finally:
        if asked:
            ray.autoscaler.sdk.request_resources(bundles=[])


async def await_free(wanted: list[Demand], deadline_s: float) -> None:
    """Wait until the processes that an earlier run has ended are gone and have freed devices and their memory.

    The wait ends after `deadline_s`: actors wait by themselves for what others hold on a shared cluster.
    """
    import ray

    give_up = time.monotonic() + deadline_s
    while missing(wanted, ray.available_resources()) is not None and time.monotonic() < give_up:
        await asyncio.sleep(0.2)


def bundles(wanted: list[Demand]) -> list[dict[str, float]]:
    """One bundle per actor, as Ray's autoscaler takes them; an actor that asks for nothing is left out."""
    return [d.each for d in wanted for _ in range(_num_bundles(d))]


def _num_bundles(demand: Demand) -> int:
    return demand.num_actors if demand.each else 0
