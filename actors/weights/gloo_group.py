"""What both ends of a gloo weight transfer share: how an engine joins the transfer group, and the vote of its members.

    GlooTrainer (learner rank 0)                             GlooEngine (vLLM worker), in a thread beside sampling
      fill a bucket, digest and seals at its end ----------->  compare, then load and pack
          engines that can map the sender's memory read it there; they are sent its trailer alone
          the others are broadcast the whole bucket
      until all have voted                       <-----------  everything is loaded, or something was refused
                                                             and when paused: swap

Memory besides the model: the sender's holds it once, for all engines on its machine (two buckets, if none of them is there). Each
engine holds it once more, see `shadow.Shadow`; on a GPU it holds what arrived, and loads when it is paused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo

from actors.rendezvous import Meeting


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What an engine needs to know to join a transfer group and to receive the buckets of its plan."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    bucket_bytes: int
    shared: bool
    """Whether this group's engines read the buckets where the sender fills them."""
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    key: str = field(repr=False)
    """The key of this group, as hexadecimal text."""

    @property
    def meeting(self) -> Meeting:
        return Meeting(self.master_address, self.master_port, bytes.fromhex(self.key))


def count_refusals(group: Any, refused: bool) -> int:
    """The number of members of the group that refuse, once all have voted."""
    votes = torch.tensor([int(refused)])
    group.allreduce([votes]).wait()
    return int(votes)
