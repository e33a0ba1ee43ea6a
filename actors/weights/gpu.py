"""The sending ends of vLLM's nccl and ipc transfers, formed without a port that strangers could reach and without pickle.

vLLM's own ends meet in a store on all interfaces, and unpickle what it holds (nccl); or gather CUDA handles over the ranks by a
collective that unpickles them (ipc). Here NCCL's id goes to the engines through actor calls, and handles travel as text.
"""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
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


@dataclass
class NcclTrainerInitInfo(TrainerInitInfo):
    backend: ClassVar[str] = "nccl_checked"

    world_size: int
    bucket_bytes: int


class NcclTrainer(NCCLTrainerWeightTransferEngine):
    init_info_cls = NcclTrainerInitInfo

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
        with ThreadPoolExecutor(max_workers=1) as calls:
            joined = calls.submit(self.client.init_weight_transfer_engine, worker_init_payload(told))
            device = torch.accelerator.current_device_index()
            self.model_update_group = uid_init_process_group(unique_id, 0, init_info.world_size, device)
            joined.result()


@dataclass
class IpcTrainerInitInfo(IPCTrainerInitInfo):
    backend: ClassVar[str] = "ipc_checked"


class IpcTrainer(IPCTrainerWeightTransferEngine):
    init_info_cls = IpcTrainerInitInfo

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
