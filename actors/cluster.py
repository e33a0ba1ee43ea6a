"""The Ray cluster under a run: start one or join one, and see that it has what the run asks for before waiting for it."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import Any, Protocol

from grpo_ray.config import ClusterConfig, RunConfig, SftConfig
from grpo_ray.errors import ResourceError
from grpo_ray.secrets import token_path

NAMESPACE = "grpo-ray"
CONTROLLER = "/controller"
COMMON: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
LOCAL_START_TRIES = 2


class OnCluster(Protocol):
    """A config that says on which cluster."""

    @property
    def cluster(self) -> ClusterConfig: ...


def connect(config: OnCluster) -> None:
    """Join `cluster.address`, or start a cluster on this machine.

    Raises:
        ResourceError: the address does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_agent_register_timeout_ms", "100000")
    if joins(config):
        join(config.cluster.address or os.environ["RAY_ADDRESS"])
    else:
        _start_local(config.cluster.num_cpus, COMMON)


def joins(config: OnCluster) -> bool:
    """Is there a cluster already, that goes on when this process ends?"""
    return config.cluster.address is not None or "RAY_ADDRESS" in os.environ


def join(address: str) -> None:
    """Raises ResourceError: nothing answers there, or it does not take our token."""
    check_token()
    import ray

    try:
        ray.init(address=address, **COMMON)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as e:
        raise ResourceError(
            f"no Ray cluster answers at cluster.address {address} ({e}); is its head started?"
        ) from None


def check_token() -> None:
    """See that there is a token for a cluster that runs already.

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


def controller_name(run: str) -> str:
    return run + CONTROLLER


def _start_local(num_cpus: int | None, common: dict[str, Any]) -> None:
    """Ray gives its own processes 30 s, which a busy machine's first, cold start can miss; the second finds warm files."""
    import ray

    for left in reversed(range(LOCAL_START_TRIES)):
        try:
            # Makes the token, if there is none yet.
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **common)
            _keep_token_private()
            return
        except Exception as e:
            ray.shutdown()
            if not left:
                raise ResourceError(
                    f"Ray did not start on this machine in {LOCAL_START_TRIES} tries ({e}); is it very busy, or out of memory or "
                    "disk? Its logs are in the session_latest folder of Ray's temporary directory"
                ) from None


def _keep_token_private() -> None:
    """Ray writes it readable for everyone on the machine."""
    path = token_path(os.environ)
    if path.is_file() and path.stat().st_uid == os.getuid():
        path.chmod(0o600)


def has_gpus() -> bool:
    """Does any node of the cluster offer GPUs?"""
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def shares_devices(config: RunConfig, gpus: bool) -> bool:
    """Do samplers and learners take turns on the same devices: parts of one GPU, or more threads than this machine has cores?"""
    rollout, learner = config.rollout, config.learner
    if config.colocated:
        return True
    if gpus:
        return any(part is not None and part % 1 > 0 for part in (rollout.num_gpus, learner.num_gpus))
    cores = os.cpu_count() or 1
    threads = learner.num_threads or (1 if learner.num_actors > 1 else cores)
    return rollout.num_actors * (rollout.num_threads or 1) + learner.num_actors * threads > cores


SHARED_GPU = 0.5
"""Of a GPU that an engine and a learner have in turns, what Ray counts for each."""


def gpus_per_engine(config: RunConfig, gpus: bool) -> float:
    rollout = config.rollout
    if rollout.num_gpus is not None or not gpus:
        return rollout.num_gpus or 0.0
    return SHARED_GPU if config.colocated else float(rollout.tensor_parallel_size)


def gpus_per_learner(config: RunConfig | SftConfig, gpus: bool) -> float:
    if config.learner.num_gpus is not None or not gpus:
        return config.learner.num_gpus or 0.0
    return SHARED_GPU if isinstance(config, RunConfig) and config.colocated else 1.0


def reserve_pairs(config: RunConfig) -> Any:
    """A placement group with a bundle per GPU for its engine and its learner, which meet there by their number."""
    import ray

    cpus = config.rollout.num_cpus + config.learner.num_cpus
    return ray.util.placement_group([{"GPU": 1, "CPU": cpus}] * config.rollout.num_actors)


def placed(group: Any, index: int) -> dict[str, Any]:
    """Options of an actor for the bundle of this number; none without a group."""
    if group is None:
        return {}
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)}


@dataclass(frozen=True)
class Demand:
    """What one kind of worker asks of the cluster."""

    option: str
    """The config section, e.g. `rollout`."""
    num_actors: int
    num_cpus: float
    """Per actor."""
    num_gpus: float
    """Per actor."""


def demands(config: RunConfig | SftConfig, gpus: bool) -> list[Demand]:
    learner = config.learner
    out = []
    if isinstance(config, RunConfig):
        rollout = config.rollout
        out.append(Demand("rollout", rollout.num_actors, rollout.num_cpus, gpus_per_engine(config, gpus)))
        out += [Demand(name, r.num_actors, r.num_cpus, r.num_gpus) for name, r in config.reward.pools.items()]
    out.append(Demand("learner", learner.num_actors, learner.num_cpus, gpus_per_learner(config, gpus)))
    return out


def missing(wanted: list[Demand], offered: dict[str, float]) -> str | None:
    """One line saying what is asked for beyond what there is; None when everything fits.

    Sums only: whether single nodes can hold single actors shows when they are placed.
    """
    lines = []
    for kind, per_actor in (("CPU", lambda d: d.num_cpus), ("GPU", lambda d: d.num_gpus)):
        asked = sum(d.num_actors * per_actor(d) for d in wanted)
        have = offered.get(kind, 0)
        if asked > have + 1e-9:
            parts = " + ".join(f"{d.option} {d.num_actors} x {per_actor(d):g}" for d in wanted if per_actor(d))
            lines.append(f"{asked:g} {kind}s are asked for ({parts}), {have:g} are there")
    if not lines:
        return None
    return (
        "; ".join(lines) + ". Lower num_actors, num_cpus or num_gpus of those, add nodes, "
        "or on this machine alone let more actors share its cores with cluster.num_cpus"
    )


async def await_resources(wanted: list[Demand], deadline_s: float) -> None:
    """Wait until the cluster is large enough, for nodes may still be joining.

    Raises:
        ResourceError: after `deadline_s`, saying what is missing. At once when no autoscaler or other node can bring more.
    """
    import ray
    import ray.autoscaler.sdk

    alone = len([n for n in ray.nodes() if n["Alive"]]) == 1 and "RAY_ADDRESS" not in os.environ
    give_up = time.monotonic() + (0 if alone else deadline_s)
    asked = False
    try:
        while True:
            lacking = missing(wanted, ray.cluster_resources())
            if lacking is None:
                return
            if time.monotonic() >= give_up:
                raise ResourceError(f"the cluster is too small: {lacking}")
            if not asked:
                # An autoscaler brings nodes for what is asked for, and actors are placed only when all of them fit.
                ray.autoscaler.sdk.request_resources(bundles=bundles(wanted))
                asked = True
            await asyncio.sleep(0.5)
    finally:
        if asked:
            ray.autoscaler.sdk.request_resources(bundles=[])


async def await_free(wanted: list[Demand], deadline_s: float) -> None:
    """Wait until processes that an earlier run has ended are gone and have left devices and their memory.

    No longer than `deadline_s`: what others hold on a shared cluster, actors wait for by themselves.
    """
    import ray

    give_up = time.monotonic() + deadline_s
    while missing(wanted, ray.available_resources()) is not None and time.monotonic() < give_up:
        await asyncio.sleep(0.2)


def bundles(wanted: list[Demand]) -> list[dict[str, float]]:
    """One per actor, as Ray's autoscaler takes them; an actor that asks for nothing is left out."""
    each = [({"CPU": d.num_cpus, "GPU": d.num_gpus}, d.num_actors) for d in wanted]
    return [b for kinds, n in each if (b := {k: v for k, v in kinds.items() if v}) for _ in range(n)]
