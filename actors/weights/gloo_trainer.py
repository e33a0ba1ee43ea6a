"""The sending end of gloo weight transfers, in the learner ranks. See actors/weights/gloo_group.py for both ends."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import chain
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)

from actors.rendezvous import join_gloo, listen_at, new_key
from actors.runtime import LOOPBACK
from actors.weights.buckets import TRAILER, Bucket, DigestSource, Sealer, plan_buckets, set_digest
from actors.weights.gloo_group import GlooInitInfo, count_refusals
from actors.weights.memory import Address, SharedMemory
from actors.weights.protocol import EngineTarget

log = logging.getLogger(__name__)


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"

    bucket_bytes: int
    timeout_s: float


@runtime_checkable
class StagingClient(VLLMWeightSyncClient, Protocol):
    """What the gloo backend needs of its client besides vLLM's four methods."""

    targets: list[EngineTarget]

    def share(self, address: Address) -> list[EngineTarget]:
        """The engines that can map this memory, and have."""
        ...

    def are_here(self, targets: list[EngineTarget]) -> bool:
        """Whether all of the engines are on this process's node."""
        ...

    def join(self, targets: list[EngineTarget], init_info: dict[str, Any]) -> None:
        """Make these engines join a transfer group, with consecutive ranks from `rank_offset`."""
        ...

    def stage(self) -> None:
        """Make every engine begin to receive."""
        ...

    def wait_staged(self) -> None:
        """Wait until every engine has everything."""
        ...


class GlooTrainer(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The sending end, in every learner rank; rank 0 sends, the others take part in gathering."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(self, *, client: StagingClient, source: DigestSource, init_info: GlooTrainerInitInfo) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self.staging_client = client
        self.digest_source = source
        self._metadata = source.metadata()
        self._plan = plan_buckets(self._metadata, init_info.bucket_bytes)
        self._calls = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._memory: SharedMemory | None = None
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        """The buffers of even and odd buckets, without shared memory."""
        self._groups: list[tuple[Any, bool]] = []
        """The transfer groups, each with whether its engines share the memory."""
        self._key = new_key()
        self._num_transfers = 0
        self._sealer = Sealer(self._key, 0)

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        if not isinstance(source, DigestSource) or not isinstance(client, StagingClient):
            raise TypeError(
                f"the gloo backend sends from a DigestSource, not from {type(source).__name__}, by a StagingClient"
            )
        engine = cls(client=client, source=source, init_info=init_info)
        if engine.is_sender:
            engine._connect(init_info)
        return engine

    def send_weights(self) -> None:
        """Send the weights to where each engine keeps them until it is paused; returns when all have them."""
        weights = iter(self.digest_source)
        if not self.is_sender:
            for _ in weights:
                pass
            return
        self._num_transfers += 1
        self._sealer = Sealer(self._key, self._num_transfers)
        buckets = (self._fill(number, bucket, weights) for number, bucket in enumerate(self._plan))
        # The first one is filled while the engines get ready.
        ready = self._calls.submit(self.staging_client.stage)
        first = next(buckets)
        ready.result()
        broken = None
        refusals = 0
        try:
            under_way: list[Any] = []
            for flat in chain([first], buckets):
                if self._memory is None:
                    _wait_for(under_way)
                under_way += [group.broadcast(flat[-TRAILER:] if shared else flat, 0) for group, shared in self._groups]
            _wait_for(under_way)
            refusals = sum(count_refusals(group, refused=False) for group, _ in self._groups)
        except RuntimeError as e:
            broken = e
        if broken is not None or refusals:
            # The engine that broke the group, or refuses, reports more than "connection reset by peer".
            self.staging_client.wait_staged()
            raise broken or RuntimeError(f"{refusals} engines refuse the weights")
        # The source is read to its end, so that the other ranks' collectives find their partner.
        for name, _ in weights:
            raise RuntimeError(f"the weight source yields {name!r}, which its metadata() does not declare")

    def shutdown(self) -> None:
        self._groups = []
        self._memory = None

    def _connect(self, init_info: GlooTrainerInitInfo) -> None:
        sharing = self._share()
        others = [t for t in self.staging_client.targets if t not in sharing]
        if not sharing:
            self._memory = None
        address_of_node = ray.util.get_node_ip_address()
        info = GlooInitInfo(
            master_address=address_of_node,
            master_port=0,
            rank_offset=1,
            world_size=0,
            timeout_s=init_info.timeout_s,
            bucket_bytes=init_info.bucket_bytes,
            shared=False,
            names=[m.name for m in self._metadata],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in self._metadata],
            shapes=[list(m.shape) for m in self._metadata],
            key=self._key.hex(),
        )
        for targets, shared in ((sharing, True), (others, False)):
            if not targets:
                continue
            host = LOOPBACK if self.staging_client.are_here(targets) else address_of_node
            # Passing on the socket, not its number, leaves no moment in which another process could take the port.
            listening = listen_at(host)
            info = replace(
                info,
                master_address=host,
                master_port=listening.getsockname()[1],
                world_size=1 + sum(t.world_size for t in targets),
                shared=shared,
            )
            joined = self._calls.submit(self.staging_client.join, targets, asdict(info))
            timeout = timedelta(seconds=info.timeout_s)
            self._groups.append(
                (join_gloo(info.meeting, 0, info.world_size, timeout, address_of_node, listening), shared)
            )
            joined.result()

    def _share(self) -> list[EngineTarget]:
        """The engines that read the weights in this process's memory; none, if there is not enough of it."""
        num_bytes = self._plan[-1].end
        try:
            self._memory = SharedMemory(num_bytes)
        except OSError as e:
            log.warning("no %.1f MB of shared memory for weights (%s): engines get them by gloo", num_bytes / 1e6, e)
            return []
        try:
            return self.staging_client.share(self._memory.address)
        finally:
            self._memory.withdraw()

    def _fill(self, number: int, bucket: Bucket, weights: Iterator[tuple[str, Tensor]]) -> Tensor:
        """[bucket.size] the next weights, with the trailer."""
        flat = self._place(number, bucket)
        for slot in bucket.slots:
            name, tensor = next(weights, ("(nothing)", torch.empty(0)))
            if name != slot.name or tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
                raise ValueError(
                    f"the weight source yields {name} {tensor.dtype} {tuple(tensor.shape)} where its metadata() declares "
                    f"{slot.name} {slot.dtype} {slot.shape}"
                )
            slot.view(flat).copy_(tensor)
        set_digest(flat, self.digest_source.digest.value())
        self._sealer.seal(flat, number, contents=not all(shared for _, shared in self._groups))
        return flat

    def _place(self, number: int, bucket: Bucket) -> Tensor:
        if self._memory is not None:
            return self._memory.bytes[bucket.start : bucket.end]
        if len(self._buffers[number % 2]) < bucket.size:
            self._buffers[number % 2] = torch.empty(bucket.size, dtype=torch.uint8)
        return self._buffers[number % 2][: bucket.size]


def _wait_for(under_way: list[Any]) -> None:
    for work in under_way:
        work.wait()
    under_way.clear()
