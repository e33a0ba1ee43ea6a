"""The learner ranks' process group: torch's, over a sealed store, and DeepSpeed on top of it."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from actors.devices import check_cuda
from actors.rendezvous import Meeting, SealedStore, open_store, prove_membership, refuse_objects
from actors.runtime import LOOPBACK, use_nodes_interface


def join_process_group(
    meeting: Meeting, store: SealedStore | None, rank: int, num_ranks: int, timeout: timedelta, *, on_cpu: bool
) -> SealedStore:
    """Join the ranks' process group; all ranks together.

    Args:
        store: the store that this rank opened for the meeting; None: another rank did.
        timeout: the limit of each collective.

    Returns:
        The store, which the caller has to keep: torch keeps only its C++ part alive.

    Raises:
        ResourceError: torch can't use the GPU that Ray gave this rank.
    """
    check_cuda(f"learner-{rank}")
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": meeting.host,
        "MASTER_PORT": str(meeting.port),
    }
    use_nodes_interface(on_one_node=meeting.host == LOOPBACK)
    refuse_objects()
    store = store or open_store(meeting, timeout)
    dist.init_process_group(
        "gloo" if on_cpu else "cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=num_ranks, timeout=timeout
    )
    prove_membership(dist.group.WORLD, meeting.key, rank, num_ranks)
    import deepspeed

    # Compiled at first use (18 s and more), for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    return store
