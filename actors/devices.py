"""The GPUs of an actor: those that Ray gave it, and no others."""

from __future__ import annotations

import os
from importlib import metadata

from grpo_ray.errors import ResourceError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def given_gpus() -> int:
    """The number of GPUs that Ray gave this actor, in whole or in part; 0 in other processes."""
    import ray

    return len(ray.get_runtime_context().get_accelerator_ids()["GPU"]) if ray.is_initialized() else 0


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
