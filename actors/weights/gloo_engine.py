"""The receiving end of gloo weight transfers, in vLLM's workers. See actors/weights/gloo_group.py for both ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightTransferEngine, WeightTransferUpdateInfo
from vllm.utils.network_utils import get_ip

from actors.rendezvous import join_gloo
from actors.weights.buckets import TRAILER, Bucket, Digest, Sealer, digest_in, plan_buckets
from actors.weights.gloo_group import GlooInitInfo, count_refusals
from actors.weights.memory import Address, map_memory

if TYPE_CHECKING:
    from actors.weights.shadow import Loader


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    checksum: str
    """The sender's checksum of the weights to load."""


class GlooEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The receiving end, inside vLLM's worker: `stage` while it samples, then an update while it is paused."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._memory: Tensor | None = None
        self._inbox: Inbox | None = None

    def share(self, address: Address) -> bool:
        """Map the sender's memory, if it is on this machine, and leave an older transfer group."""
        self._inbox = None
        self._memory = map_memory(address)
        return self._memory is not None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the transfer group, and leave an older one."""
        # Here, because these imports would slow down the sender.
        from actors.weights.shadow import Shadow, WhenPaused

        self._inbox = None
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        described = zip(init_info.names, init_info.dtype_names, init_info.shapes, strict=True)
        metadata = [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in described]
        loader = (Shadow if self.device.type == "cpu" else WhenPaused)(self.model, self.model_config)
        plan = plan_buckets(metadata, init_info.bucket_bytes)
        self._inbox = Inbox(init_info, rank, loader, plan, self._memory if init_info.shared else None)
        self._memory = None

    def stage(self) -> None:
        """Begin to receive; returns at once."""
        self._connected().open()

    def staged(self) -> bool:
        """See `Inbox.is_full`."""
        return self._connected().is_full()

    def start_weight_update(self) -> None:
        """Do nothing: everything was done beside sampling."""

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Swap in what was staged."""
        self._connected().swap(update_info.checksum)

    def finish_weight_update(self) -> None:
        """Do nothing: nothing is left to do."""

    def shutdown(self) -> None:
        self._inbox = None

    def _connected(self) -> Inbox:
        if self._inbox is None:
            raise RuntimeError("weights before init_weight_transfer_engine: there is no transfer group yet")
        return self._inbox


class Inbox:
    """The receiver of weights, in a thread of its own. Each transfer group has one: what an older group may still write to is not
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
        """Whether everything is loaded.

        Raises:
            RuntimeError: a bucket did not arrive as it was sent, or the transfer group broke.
            Exception: the model refuses these weights.
        """
        if self._loaded is None or not self._loaded.done():
            return False
        self._loaded.result()
        return True

    def swap(self, checksum: str) -> None:
        """Swap the loaded weights into the model, once.

        Raises:
            RuntimeError: they are not what the sender sent under this checksum; the model is unchanged.
        """
        loaded = None if self._loaded is None else self._loaded.result()
        if loaded != checksum:
            raise RuntimeError(f"weight transfer: checksum {loaded} is loaded, the sender's is {checksum}")
        self._loaded = None
        self._loader.swap()

    def _receive(self) -> str:
        """Receive all weights; returns their digest."""
        digest = Digest()
        arriving = self._arriving(digest)
        try:
            self._loader.load(arriving)
        except Exception:
            # The sender and the others would wait for ever for an engine that does not take the rest.
            with contextlib.suppress(RuntimeError):
                for _ in arriving:
                    pass
                count_refusals(self._group, refused=True)
            raise
        count_refusals(self._group, refused=False)
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
