"""Both ends of a weight transfer, as vLLM's factories want them: `gloo` for CPUs, and checked forms of vLLM's `nccl` and `ipc`.

gloo, on the wire: the parameters in the order of `WeightSource.metadata()`, copied into flat uint8 buckets, each broadcast from
rank 0 with an 8-byte trailer: the running digest after its last tensor. The receiver takes them in a thread beside sampling and
compares; only what arrived whole and right is loaded, when sampling is paused. It holds the model twice: what it samples with, and
what came.

The receivers of nccl and ipc digest what reaches `load_weights`; the actor compares with the sender's digest before the update
is finished (`DigestExtension`), so a wrong transfer never gets a version.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
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
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferUpdateInfo

WORKER_BACKENDS = {"gloo": "gloo", "nccl": "nccl_checked", "ipc": "ipc_checked"}
"""`weights.backend` -> the name under which the receiving engine is registered with vLLM."""

_ALIGN = 16
_TRAILER = 8
_ENGINE_SAYS_S = 10.0
_MASK = (1 << 64) - 1
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By their bytes. Of eight bytes the sum is 24 times faster than of four, which have to be widened first."""


class Digest:
    """A checksum of tensors in their order: their names, and the sum of each one's bit patterns read as integers.

    Sums run where the tensor lives and are fetched together, so that a GPU is not made to wait for every parameter.
    It finds corruption, loss and mix-ups; it is no defence against a forger.
    """

    def __init__(self) -> None:
        self._state = 0
        self._names: list[str] = []
        self._sums: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().contiguous().view(-1)
        size = 8 if flat.nbytes % 8 == 0 and flat.data_ptr() % 8 == 0 else flat.element_size()
        self._names.append(name)
        self._sums.append(flat.view(_WORDS[size]).sum(dtype=torch.int64))

    def value(self) -> int:
        """Of everything added so far, in [0, 2**64)."""
        if self._sums:
            for name, total in zip(self._names, torch.stack(self._sums).tolist(), strict=True):
                self._state = (self._state * 1_000_003 + zlib.crc32(name.encode()) + total) & _MASK
            self._names.clear()
            self._sums.clear()
        return self._state

    def hex(self) -> str:
        return f"{self.value():016x}"


class DigestSource(WeightSource):
    """A source that digests what it hands out; `digest` is of the pass under way, or of the last one."""

    def __init__(self, inner: WeightSource) -> None:
        self.inner = inner
        self.digest = Digest()

    def metadata(self) -> list[ParamMeta]:
        return self.inner.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digest = Digest()
        for name, tensor in self.inner:
            self.digest.add(name, tensor)
            yield name, tensor


@dataclass(frozen=True)
class _Slot:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte in the bucket."""
    end: int

    def view(self, bucket: Tensor) -> Tensor:
        return bucket[self.start : self.end].view(self.dtype).view(self.shape)


def plan_buckets(metadata: Iterable[ParamMeta], bucket_bytes: int) -> Iterator[tuple[list[_Slot], int]]:
    """Cut the parameters into buckets of at most `bucket_bytes` (one larger parameter has a bucket of its own).

    Yields:
        The parameters of a bucket, and its size in bytes without the trailer. Both ends make the same plan.
    """
    slots: list[_Slot] = []
    size = 0
    for meta in metadata:
        num_bytes = torch.Size(meta.shape).numel() * meta.dtype.itemsize
        if slots and size + num_bytes > bucket_bytes:
            yield slots, size
            slots, size = [], 0
        slots.append(_Slot(meta.name, meta.dtype, tuple(meta.shape), size, size + num_bytes))
        size += -(-num_bytes // _ALIGN) * _ALIGN
    if slots:
        yield slots, size


def _set_trailer(bucket: Tensor, digest: int) -> None:
    bucket[-_TRAILER:] = torch.tensor(list(digest.to_bytes(_TRAILER, "little")), dtype=torch.uint8)


def _trailer(bucket: Tensor) -> int:
    return int.from_bytes(bytes(bucket[-_TRAILER:].tolist()), "little")


def repack_cpu_heads(model: torch.nn.Module) -> None:
    """Refresh the packed copy that vLLM's CPU lm_head keeps of a tied embedding.

    With tied embeddings lm_head shares `embed_tokens.weight` but multiplies with a packed copy of its own (`cpu_linear`),
    which the layerwise reload of vLLM 0.32 leaves as it was: outputs would silently go on using the old head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


# gloo


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


def _gloo_group(
    host: str, port: int, rank: int, world_size: int, timeout_s: float, listen_socket: socket.socket | None = None
) -> Any:
    return stateless_init_torch_distributed_process_group(
        host,
        port,
        rank,
        world_size,
        backend="gloo",
        timeout=timedelta(seconds=timeout_s),
        listen_socket=listen_socket,
    )


class _Inbox:
    """Weights on their way in, in a thread of their own. Each transfer group has one: what an older group may still write to is not
    touched again."""

    def __init__(self, group: Any, bucket_bytes: int) -> None:
        self.digest = Digest()
        self._group = group
        self._bucket_bytes = bucket_bytes
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")
        self._arrived: Future[list[list[tuple[str, Tensor]]]] | None = None
        self._buffers: dict[int, Tensor] = {}
        """Place of a bucket -> its memory, kept for the next sync: fresh pages cost more than the copy into them."""

    def open(self, metadata: list[ParamMeta]) -> None:
        """Begin to receive; returns at once."""
        self.digest = Digest()
        self._arrived = self._thread.submit(self._receive, metadata)

    def is_full(self) -> bool:
        """Has everything arrived?

        Raises:
            RuntimeError: a bucket that did not arrive as it was sent, or a transfer group that broke.
        """
        if self._arrived is None or not self._arrived.done():
            return False
        self._arrived.result()
        return True

    def take(self) -> list[list[tuple[str, Tensor]]]:
        """The weights, once. They are views of memory that the next `open` writes to."""
        if not self.is_full() or self._arrived is None:
            raise RuntimeError("weights are loaded before all of them have arrived")
        arrived, self._arrived = self._arrived.result(), None
        return arrived

    def _receive(self, metadata: list[ParamMeta]) -> list[list[tuple[str, Tensor]]]:
        out, refused = [], ""
        for place, (slots, size) in enumerate(plan_buckets(metadata, self._bucket_bytes)):
            bucket = _reuse(self._buffers, place, size + _TRAILER)
            self._group.broadcast(bucket, 0).wait()
            weights = [(slot.name, slot.view(bucket)) for slot in slots]
            for name, tensor in weights:
                self.digest.add(name, tensor)
            if self.digest.value() != _trailer(bucket) and not refused:
                refused = (
                    f"weight transfer: the bucket {slots[0].name} .. {slots[-1].name} ({size} bytes) has checksum "
                    f"{self.digest.hex()}, the sender's is {_trailer(bucket):016x}; it is refused"
                )
            out.append(weights)
        # Only now: the sender would wait for ever for one who does not take the rest.
        if refused:
            raise RuntimeError(refused)
        return out


def _reuse(buffers: dict[int, Tensor], place: int, num_bytes: int) -> Tensor:
    if place not in buffers or len(buffers[place]) != num_bytes:
        buffers[place] = torch.empty(num_bytes, dtype=torch.uint8)
    return buffers[place]


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving end, inside vLLM's worker: `stage` while it samples, then an update while it is paused."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inbox: _Inbox | None = None

    @property
    def digest(self) -> Digest:
        """Of what was received last."""
        return self._connected().digest

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the transfer group; an older group is left."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        group = _gloo_group(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )
        self.inbox = _Inbox(group, init_info.bucket_bytes)

    def stage(self, update_info: GlooUpdateInfo) -> None:
        """Begin to receive; returns at once."""
        described = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        self._connected().open([ParamMeta(name, getattr(torch, d), tuple(shape)) for name, d, shape in described])

    def staged(self) -> bool:
        """See `_Inbox.is_full`."""
        return self._connected().is_full()

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load what was staged."""
        for weights in self._connected().take():
            self.model.load_weights(weights)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        repack_cpu_heads(self.model)

    def shutdown(self) -> None:
        self.inbox = None

    def _connected(self) -> _Inbox:
        if self.inbox is None:
            raise RuntimeError("weights before init_weight_transfer_engine: there is no transfer group yet")
        return self.inbox


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "gloo"

    master_address: str
    listen_socket: socket.socket | None
    """Bound and listening; rank 0's. Handing over the socket and not its number leaves no moment for another to take the port."""
    world_size: int
    bucket_bytes: int
    timeout_s: float


@runtime_checkable
class StagingClient(VLLMWeightSyncClient, Protocol):
    """What the gloo backend asks of its client besides vLLM's four methods."""

    def stage(self, update_info: dict[str, Any]) -> None:
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
        self.init_info = init_info
        self.group: Any = None
        self._buffers: dict[int, Tensor] = {}

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        if not isinstance(source, DigestSource) or not isinstance(client, StagingClient):
            raise TypeError(
                f"the gloo backend sends from a DigestSource, not from {type(source).__name__}, by a StagingClient"
            )
        engine = cls(client=client, source=source, init_info=init_info)
        if not engine.is_sender:
            return engine
        assert init_info.listen_socket is not None
        port = init_info.listen_socket.getsockname()[1]
        worker = GlooInitInfo(
            master_address=init_info.master_address,
            master_port=port,
            rank_offset=1,
            world_size=init_info.world_size,
            bucket_bytes=init_info.bucket_bytes,
            timeout_s=init_info.timeout_s,
        )
        pool = ThreadPoolExecutor(max_workers=1)
        try:
            joined = pool.submit(client.init_weight_transfer_engine, asdict(worker))
            engine.group = _gloo_group(
                init_info.master_address, port, 0, init_info.world_size, init_info.timeout_s, init_info.listen_socket
            )
            joined.result()
        finally:
            pool.shutdown(wait=False)
        return engine

    def send_weights(self) -> None:
        """To where each engine keeps them until it is paused; returns when all have them."""
        metadata = self.digest_source.metadata()
        weights = iter(self.digest_source)
        if not self.is_sender:
            for _ in weights:
                pass
            return
        update = GlooUpdateInfo(
            names=[m.name for m in metadata],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in metadata],
            shapes=[list(m.shape) for m in metadata],
        )
        self.staging_client.stage(asdict(update))
        broken = None
        try:
            under_way: Any = None
            for number, (slots, size) in enumerate(plan_buckets(metadata, self.init_info.bucket_bytes)):
                # One is filled while the one before is on its way.
                bucket = self._fill(number % 2, slots, size, weights)
                if under_way is not None:
                    under_way.wait()
                under_way = self.group.broadcast(bucket, 0)
            if under_way is not None:
                under_way.wait()
        except RuntimeError as e:
            broken = e
        # If an engine broke the group, it says more than "connection reset by peer".
        self.staging_client.wait_staged()
        if broken is not None:
            raise broken
        # To its end, so that the other ranks' collectives find their partner.
        for name, _ in weights:
            raise RuntimeError(f"the weight source yields {name!r}, which its metadata() does not declare")

    def _fill(self, place: int, slots: list[_Slot], size: int, weights: Iterator[tuple[str, Tensor]]) -> Tensor:
        bucket = _reuse(self._buffers, place, size + _TRAILER)
        for slot in slots:
            name, tensor = next(weights, ("(nothing)", torch.empty(0)))
            if name != slot.name or tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
                raise ValueError(
                    f"the weight source yields {name} {tensor.dtype} {tuple(tensor.shape)} where its metadata() declares "
                    f"{slot.name} {slot.dtype} {slot.shape}"
                )
            slot.view(bucket).copy_(tensor)
        _set_trailer(bucket, self.digest_source.digest.value())
        return bucket


# nccl and ipc: vLLM's own engines, which also digest what they load


@contextmanager
def _digested(model: torch.nn.Module, digest: Digest) -> Iterator[None]:
    load_weights: Any = model.load_weights

    def load(weights: Iterable[tuple[str, Tensor]]) -> Any:
        items = list(weights)
        for name, tensor in items:
            digest.add(name, tensor)
        return load_weights(items)

    setattr(model, "load_weights", load)  # noqa: B010 - to the type checker, attributes of a module are tensors
    try:
        yield
    finally:
        del model.load_weights


class CheckedNcclEngine(NCCLWeightTransferEngine):
    def start_weight_update(self) -> None:
        self.digest = Digest()
        super().start_weight_update()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        with _digested(self.model, self.digest):
            super().receive_weights(update_info)


class CheckedIpcEngine(IPCWeightTransferEngine):
    def start_weight_update(self) -> None:
        self.digest = Digest()
        super().start_weight_update()

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        with _digested(self.model, self.digest):
            super().receive_weights(update_info)


class DigestExtension:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    weight_transfer_engine: Any

    def weight_transfer_digest(self) -> str:
        """Of what this worker received for the update under way."""
        return self.weight_transfer_engine.digest.hex()

    def weight_transfer_stage(self, update_info: dict[str, Any]) -> None:
        """See `GlooEngine.stage`."""
        engine = self.weight_transfer_engine
        engine.stage(engine.parse_update_info(update_info))

    def weight_transfer_staged(self) -> bool:
        """See `GlooEngine.staged`."""
        return self.weight_transfer_engine.staged()


def register() -> None:
    """Make the backends known to vLLM in this process. Any number of times."""
    receivers: dict[str, type[WeightTransferEngine]] = {
        "gloo": GlooEngine,
        "nccl_checked": CheckedNcclEngine,
        "ipc_checked": CheckedIpcEngine,
    }
    for name, receiver in receivers.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, receiver)
    if "gloo" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine("gloo", GlooTrainer)
