"""The GPUs of an actor: those that Ray gave it, and no others.

Ray gives an actor a part of one GPU, or whole ones. An engine that takes turns with learner ranks on several GPUs has a part of
each: Ray counts none for it, and it takes the GPUs of its places, which Ray keeps for the run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from actors.places import Place
from grpo_ray.errors import ResourceError

VISIBLE = "CUDA_VISIBLE_DEVICES"
PLACES_S = 120.0
"""The deadline for the places of an engine to tell their GPUs: each starts a worker of Ray's."""
_of_places: list[str] = []
"""The ids of the GPUs that this process took as `SharedGpus`."""


def given_gpus() -> int:
    """The number of GPUs that this actor has, in whole or in part; 0 in other processes."""
    return len(_of_places) or len(_given_ids())


def _given_ids() -> list[str]:
    import ray

    return ray.get_runtime_context().get_accelerator_ids()["GPU"] if ray.is_initialized() else []


@dataclass(frozen=True)
class SharedGpus:
    """The GPUs of an engine whose places it shares with learner ranks."""

    places: tuple[Place, ...]
    part: float
    """The part of each GPU that the learner ranks leave: Ray tells the id of a GPU only to what gets a part of it."""

    def take(self) -> None:
        """Let this process, and those that it starts, see these GPUs. It has to come before the first use of CUDA."""
        import ray

        ask, part = ray.remote(_given_ids), {"num_cpus": 0, "num_gpus": self.part}
        told = ray.get([ask.options(**part, **place.options()).remote() for place in self.places], timeout=PLACES_S)
        _of_places[:] = [gpu for ids in told for gpu in ids]
        os.environ[VISIBLE] = ",".join(_of_places)


def take_gpus(shared: SharedGpus | None) -> None:
    """Take the GPUs of an engine that shares them; None: Ray has given this actor its own."""
    if shared is not None:
        shared.take()


def hide_other_gpus() -> None:
    """Hide every GPU from an actor that Ray gave none, and from the processes that it starts: by itself Ray leaves all of them
    visible there. It has to come before the first use of CUDA."""
    if not given_gpus():
        os.environ[VISIBLE] = ""


def check_cuda(name: str) -> None:
    """Check that torch can compute on what Ray gave this actor.

    Raises:
        ResourceError: it can't; names the actor, and the driver where that is too old.
    """
    from grpo_ray.models.cuda import why_no_cuda

    if given_gpus() and (reason := why_no_cuda()) is not None:
        raise ResourceError(f"{name} was given a GPU by Ray, and {reason}")


def check_engine_has_gpu(name: str) -> None:
    """Check that an engine of vLLM for GPUs has one.

    Raises:
        ResourceError: Ray gave it none.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda() and not given_gpus():
        raise ResourceError(
            f"{name} was given no GPU by Ray, and vLLM here is built for GPUs; set rollout.num_gpus above 0 in a cluster that "
            "counts its GPUs (ray start --num-gpus), or install the CPU stack: GRPO_RAY_GPU=no make"
        )


def gpus_of_new_node() -> int | None:
    """The GPUs that a Ray node which is started here is to count: 0 with a torch for CPUs, which was chosen at the set-up; None: as
    many as Ray finds."""
    return 0 if metadata.version("torch").endswith("+cpu") else None
