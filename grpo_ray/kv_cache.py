"""Does the cache of keys and values that is asked for fit beside everything else? Told before an engine is started."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from grpo_ray.config import RolloutConfig, RunConfig
from grpo_ray.errors import ResourceError

DEFAULT_GB = 0.25
"""Of an engine on CPUs, where rollout.kv_cache_gb says nothing."""
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_GIB = 1 << 30
SHARE = 0.85
"""Of memory: what is left is for Python, libraries and what the learner computes with."""


def machine_memory() -> int:
    """Bytes that processes here may have: the machine's, or the container's if that is less."""
    limits = [psutil.virtual_memory().total]
    for file in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    return min(limits)


def check_kv_cache(
    rollout: RolloutConfig, memory: int, num_engines: int, weights: int = 0, what: str = "machine"
) -> None:
    """
    Args:
        rollout: its `kv_cache_gb`, of each engine.
        memory: bytes of the machine, or of one GPU.
        num_engines: that share it.
        weights: bytes that each of them holds besides.
        what: `machine` or `GPU`.

    Raises:
        ResourceError: more than there is; says how much fits.
    """
    asked = DEFAULT_GB if rollout.kv_cache_gb is None else rollout.kv_cache_gb
    room = SHARE * memory / num_engines - weights
    if asked * _GIB <= room:
        return
    fits = int(max(0.0, room) / _GIB * 10) / 10
    engines = "the engine has" if num_engines == 1 else f"each of {num_engines} engines on it has"
    most = (
        f"lower it to {fits:g} at most"
        if fits > 0
        else "not even the weights fit: use fewer engines or a smaller model"
    )
    beside = f", beside {weights / _GIB:.1f} GiB of weights" if weights >= _GIB / 10 else ""
    raise ResourceError(
        f"rollout.kv_cache_gb is {asked:g}, which {engines}{beside}, and the {what} has {memory / _GIB:.1f} GiB of memory; {most}"
    )


def check_gpu_shares(config: RunConfig) -> None:
    """Raises ResourceError: engines that share one GPU ask for more than all of it."""
    rollout = config.rollout
    share = rollout.num_gpus
    if config.colocated or not share or share >= 1 or rollout.kv_cache_gb is not None:
        return
    engines = min(rollout.num_actors, int(1 / share))
    if engines * rollout.gpu_memory_utilization > 1:
        raise ResourceError(
            f"rollout.num_gpus {share:g} puts {engines} engines on a GPU, and each takes rollout.gpu_memory_utilization "
            f"{rollout.gpu_memory_utilization:g} of its memory; lower that to {int(95 / engines) / 100:g}"
        )
