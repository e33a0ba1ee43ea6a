"""The sending ends of vLLM's nccl and ipc transfers, formed without a port that strangers could reach and without pickle.

vLLM's own ends meet in a store on all interfaces, and unpickle what it holds (nccl); or gather CUDA handles over the ranks by a
collective that unpickles them (ipc). Here NCCL's id goes to the engines through actor calls, and handles travel as text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.base import TrainerInitInfo, VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import (
    NCCLWeightTransferInitInfo,
    uid_init_process_group,
    worker_init_payload,
)
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

from actors.rendezvous import gather_texts
from actors.weights.leaving import Group, beside


@dataclass
class NcclTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "nccl_checked"

    world_size: int
    bucket_bytes: int


class NcclTrainer(NCCLTrainerWeightTransferEngine):
    init_info_cls = NcclTrainerInitInfo
    client: Any
    model_update_group: Any

    @classmethod
    def trainer_init(
        cls, init_info: NcclTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        engine = cls(
            client=client,
            source=source,
            is_sender=init_info.is_sender,
            packed=True,
            packed_buffer_size_bytes=init_info.bucket_bytes,
        )
        if engine.is_sender:
            engine._connect(init_info, bytes(NCCLLibrary().ncclGetUniqueId().internal))
        return engine

    def _connect(self, init_info: NcclTrainerInitInfo, unique_id: bytes) -> None:
        """Connect to the engines, which get the id by the client's calls; without it NCCL takes no connection."""
        told = NCCLWeightTransferInitInfo(
            rank_offset=1,
            world_size=init_info.world_size,
            nccl_unique_id_b64=base64.b64encode(unique_id).decode(),
            packed=True,
            packed_buffer_size_bytes=init_info.bucket_bytes,
        )
        device = torch.accelerator.current_device_index()
        joined = beside(lambda: self.client.init_weight_transfer_engine(worker_init_payload(told)))
        formed = beside(lambda: uid_init_process_group(unique_id, 0, init_info.world_size, device))
        # NCCL waits without end for an engine that never comes; the calls fail.
        wait([joined, formed], return_when=FIRST_COMPLETED)
        joined.result()
        self.model_update_group = Group(formed.result())

    def send_weights(self) -> None:
        """As vLLM's own, but an engine that fails or hangs in mid-broadcast ends it: otherwise NCCL waits for that engine without
        end, and this process in NCCL.

        Raises:
            WorkerError, DeadlineError: an engine failed; the message names it.
        """
        group, client = self.model_update_group, self.client
        watched = _WatchedClient(client, None if group is None else group.destroy)
        self.client = watched
        try:
            super().send_weights()
        except RuntimeError as e:
            raise watched.failure or e from None
        finally:
            self.client = client


class _WatchedClient:
    """A client that ends the broadcast when the engines' part of it fails."""

    def __init__(self, client: VLLMWeightSyncClient, end: Callable[[], None] | None) -> None:
        self._client = client
        self._end = end
        self.failure: Exception | None = None

    def __getattr__(self, method: str) -> Any:
        return getattr(self._client, method)

    def update_weights(self, update_info: Any) -> None:
        try:
            self._client.update_weights(update_info)
        except Exception as e:
            self.failure = e
            if self._end is not None:
                self._end()
            raise


@dataclass
class IpcTrainerInitInfo(IPCTrainerInitInfo):
    backend: ClassVar[str] = "ipc_checked"


class IpcTrainer(IPCTrainerWeightTransferEngine):
    """As vLLM's own, but all ranks go on to the end when an engine fails: they gather the handles of each bucket together, and
    would wait for a sender that stopped."""

    init_info_cls = IpcTrainerInitInfo
    _failure: Exception | None = None

    def send_weights(self) -> None:
        """Send the weights to the engines on the ranks' GPUs.

        Raises:
            WorkerError, DeadlineError: an engine failed; the message names it.
        """
        self._failure = None
        self._unless_failed(self.client.start_weight_update)
        self._send(self.source)
        self._unless_failed(self.client.finish_weight_update)
        self._post_send_sync()
        if self._failure is not None:
            raise self._failure

    def _do_send(self, *args: Any, **kwargs: Any) -> None:
        self._unless_failed(lambda: super(IpcTrainer, self)._do_send(*args, **kwargs))

    def _unless_failed(self, call: Callable[[], Any]) -> None:
        if self.is_sender and self._failure is None:
            try:
                call()
            except Exception as e:
                self._failure = e

    def _all_gather_and_merge_handles(self, handles: list[dict[str, tuple[Any, ...]]]) -> list[dict[str, Any]]:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return handles
        (own,) = handles
        texts = gather_texts(handle_text(own), torch.device("cuda", self.device_index))
        dist.barrier()
        torch.cuda.synchronize()
        return [{gpu: args for text in texts for gpu, args in read_handle(text).items()} if self.is_sender else {}]


def handle_text(handle: dict[str, tuple[Any, ...]]) -> str:
    """The text of what `reduce_tensor` returns for a buffer of bytes, by its GPU: numbers, and bytes as hexadecimal text."""
    ((gpu, args),) = handle.items()
    kind, shape, stride, offset, storage, dtype, *plain = args
    if (kind, storage, dtype) != (torch.Tensor, torch.storage.TypedStorage, torch.uint8):
        raise TypeError(f"weights over CUDA IPC travel in buffers of bytes, not in a {kind.__name__} of {dtype}")
    told = [each.hex() if isinstance(each, bytes) else each for each in plain]
    return json.dumps([gpu, list(shape), list(stride), offset, told, [isinstance(each, bytes) for each in plain]])


def read_handle(text: str) -> dict[str, tuple[Any, ...]]:
    """The handle in a text; see `handle_text`."""
    gpu, shape, stride, offset, told, is_bytes = json.loads(text)
    plain = [bytes.fromhex(each) if of_bytes else each for each, of_bytes in zip(told, is_bytes, strict=True)]
    kinds = (torch.Tensor, torch.Size(shape), tuple(stride), offset, torch.storage.TypedStorage, torch.uint8)
    return {gpu: (*kinds, *plain)}
