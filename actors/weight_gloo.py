"""The way of the weights on CPUs, both ends of it, as vLLM's factories want them.

    GlooTrainer (learner rank 0)                             GlooEngine (vLLM worker), in a thread beside sampling
      fill a bucket, digest and seals at its end ----------->  compare, then load and pack
          engines that can map the sender's memory read it there; they are sent its trailer alone
          the others are broadcast the whole bucket
      until all have voted                       <-----------  everything is loaded, or something was refused
                                                             and when paused: swap

Memory besides the model: the sender's holds it once, for all engines on its machine (two buckets, if none of them is there). Each
engine holds it once more, see `weight_shadow.Shadow`; on a GPU it holds what arrived, and loads when it is paused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import ray
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.utils.network_utils import get_ip

from actors.rendezvous import Meeting, join_gloo, listen_at, new_key
from actors.runtime import LOOPBACK
from actors.weight_buckets import (
    TRAILER,
    Bucket,
    Digest,
    DigestSource,
    Sealer,
    digest_in,
    plan_buckets,
    set_digest,
)
from actors.weight_memory import Address, SharedMemory, map_memory
from actors.weights import EngineTarget

if TYPE_CHECKING:
    from actors.weight_shadow import Loader

log = logging.getLogger(__name__)


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    bucket_bytes: int
    shared: bool
    """This group's engines read the buckets where the sender fills them."""
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]
    key: str = field(repr=False)
    """Of this group, as hexadecimal text."""

    @property
    def meeting(self) -> Meeting:
        return Meeting(self.master_address, self.master_port, bytes.fromhex(self.key))


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    checksum: str
    """The sender's, of the weights that are to be taken into use."""


def _refusals(group: Any, refused: bool) -> int:
    """How many members of the group refuse; waits for all of them."""
    votes = torch.tensor([int(refused)])
    group.allreduce([votes]).wait()
    return int(votes)


class _Inbox:
    """Weights on their way in, in a thread of their own. Each transfer group has one: what an older group may still write to is not
    touched again."""

    def __init__(
        self, info: GlooInitInfo, rank: int, loader: Loader, plan: list[Bucket], memory: Tensor | None
    ) -> None:
        timeout = timedelta(seconds=info.timeout_s)
        self._group: Any = join_gloo(info.meeting, rank, info.world_size, timeout, get_ip())
        self._key = info.meeting.key
        self._num_transfers = 0
        self._plan = plan
        self._loader = loader
        self._memory = memory
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._loaded: Future[str] | None = None

    def open(self) -> None:
        """Begin to receive; returns at once."""
        self._num_transfers += 1
        self._loaded = self._thread.submit(self._receive)

    def is_full(self) -> bool:
        """Is everything loaded?

        Raises:
            RuntimeError: a bucket did not arrive as it was sent, or the transfer group broke.
            Exception: the model does not take these weights.
        """
        if self._loaded is None or not self._loaded.done():
            return False
        self._loaded.result()
        return True

    def swap(self, checksum: str) -> None:
        """Let the model have what was loaded, once.

        Raises:
            RuntimeError: it is not what the sender sent under this checksum; the model is as it was.
        """
        loaded = None if self._loaded is None else self._loaded.result()
        if loaded != checksum:
            raise RuntimeError(f"weight transfer: checksum {loaded} is loaded, the sender's is {checksum}")
        self._loaded = None
        self._loader.swap()

    def _receive(self) -> str:
        """Returns the digest of everything."""
        digest = Digest()
        arriving = self._arriving(digest)
        try:
            self._loader.load(arriving)
        except Exception:
            # The sender and the others would wait for ever for one who does not take the rest.
            with contextlib.suppress(RuntimeError):
                for _ in arriving:
                    pass
                _refusals(self._group, refused=True)
            raise
        _refusals(self._group, refused=False)
        return digest.hex()

    def _arriving(self, digest: Digest) -> Iterator[list[tuple[str, Tensor]]]:
        refused = ""
        sealer = Sealer(self._key, self._num_transfers)
        for number, bucket in enumerate(self._plan):
            if self._memory is None:
                flat = told = torch.empty(bucket.size, dtype=torch.uint8)
            else:
                flat, told = self._memory[bucket.start : bucket.end], torch.empty(TRAILER, dtype=torch.uint8)
            self._group.broadcast(told, 0).wait()
            if refused:
                continue
            if not sealer.is_genuine(told, number):
                refused = f"{bucket} is not what the sender sealed: another process changed it, or sent it"
                continue
            weights = [(slot.name, slot.view(flat)) for slot in bucket.slots]
            for name, tensor in weights:
                digest.add(name, tensor)
            if digest.value() == digest_in(told):
                yield weights
            else:
                refused = f"{bucket} has checksum {digest.hex()}, the sender's is {digest_in(told):016x}"
        if refused:
            raise RuntimeError(f"weight transfer: the bucket {refused}; it is refused")


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving end, inside vLLM's worker: `stage` while it samples, then an update while it is paused."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._memory: Tensor | None = None
        self._inbox: _Inbox | None = None

    def share(self, address: Address) -> bool:
        """Map the sender's memory, if it is on this machine. An older transfer group is left."""
        self._inbox = None
        self._memory = map_memory(address)
        return self._memory is not None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the transfer group; an older group is left."""
        # Here, because the sender would be slowed by what it imports.
        from actors.weight_shadow import Shadow, WhenPaused

        self._inbox = None
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        described = zip(init_info.names, init_info.dtype_names, init_info.shapes, strict=True)
        metadata = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in described]
        loader = (Shadow if self.device.type == "cpu" else WhenPaused)(self.model, self.model_config)
        plan = plan_buckets(metadata, init_info.bucket_bytes)
        self._inbox = _Inbox(init_info, rank, loader, plan, self._memory if init_info.shared else None)
        self._memory = None

    def stage(self) -> None:
        """Begin to receive; returns at once."""
        self._connected().open()

    def staged(self) -> bool:
        """See `_Inbox.is_full`."""
        return self._connected().is_full()

    def start_weight_update(self) -> None:
        """Nothing: everything was done beside sampling."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Take what was staged into use."""
        self._connected().swap(update_info.checksum)

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        self._inbox = None

    def _connected(self) -> _Inbox:
        if self._inbox is None:
            raise RuntimeError("weights before init_weight_transfer_engine: there is no transfer group yet")
        return self._inbox


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"

    bucket_bytes: int
    timeout_s: float


@runtime_checkable
class StagingClient(VLLMWeightSyncClient, Protocol):
    """What the gloo backend asks of its client besides vLLM's four methods."""

    targets: list[EngineTarget]

    def share(self, address: Address) -> list[EngineTarget]:
        """Those that can map this memory, and have."""
        ...

    def are_here(self, targets: list[EngineTarget]) -> bool:
        """Are all of them on this process's node?"""
        ...

    def join(self, targets: list[EngineTarget], init_info: dict[str, Any]) -> None:
        """Let these engines join a transfer group, their ranks one after the other from `rank_offset`."""
        ...

    def stage(self) -> None:
        """Let every engine begin to receive."""
        ...

    def wait_staged(self) -> None:
        """Until every engine has everything."""
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
        """Of buckets that are even and odd, without shared memory."""
        self._groups: list[tuple[Any, bool]] = []
        """Each with: its engines share the memory."""
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
        """To where each engine keeps them until it is paused; returns when all have them."""
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
                    _finish(under_way)
                under_way += [group.broadcast(flat[-TRAILER:] if shared else flat, 0) for group, shared in self._groups]
            _finish(under_way)
            refusals = sum(_refusals(group, refused=False) for group, _ in self._groups)
        except RuntimeError as e:
            broken = e
        if broken is not None or refusals:
            # The engine that broke the group, or refuses, says more than "connection reset by peer".
            self.staging_client.wait_staged()
            raise broken or RuntimeError(f"{refusals} engines refuse the weights")
        # To its end, so that the other ranks' collectives find their partner.
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
            # Handing over the socket, and not its number, leaves no moment for another to take the port.
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
        """Those engines that read the weights in this process's memory; none, if there is not so much of it."""
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
        """[bucket.size] of the next weights, with the trailer."""
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


def _finish(under_way: list[Any]) -> None:
    for work in under_way:
        work.wait()
    under_way.clear()
