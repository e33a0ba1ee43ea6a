"""The backends of a weight transfer for vLLM's factories: `gloo` for CPUs, and checked forms of vLLM's `nccl` and `ipc`.

The receivers of nccl and ipc digest what reaches `load_weights`; the actor compares with the sender's digest before the update
is finished (`TransferExtension`), so a wrong transfer never gets a version. gloo's receivers compare before any use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from actors.weights.buckets import Digest
from actors.weights.gloo_engine import GlooEngine
from actors.weights.gloo_trainer import GlooTrainer
from actors.weights.leaving import Group, LeftError, forget_half_loaded, formed, until_left
from actors.weights.memory import Address

WORKER_BACKENDS = {"gloo": "gloo", "nccl": "nccl_checked", "ipc": "ipc_checked"}
"""`weights.backend` -> the name under which the receiving engine is registered with vLLM."""


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
    model_update_group: Any

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the transfer group, and leave an older one, which would keep its memory on the GPU.

        Raises:
            LeftError: another member of the group is gone, and the actor said so; see `leaving`.
        """
        self.shutdown()
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers

        def join() -> Any:
            if self.device.index is not None:
                # Each thread begins with the first GPU of its process.
                torch.accelerator.set_device_index(self.device.index)
            return nccl_engine.worker_init_process_group(init_info, self.parallel_config)

        self.model_update_group = Group(formed(join))

    def start_weight_update(self) -> None:
        self.digest = Digest()
        forget_half_loaded(self.model)
        super().start_weight_update()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive all weights.

        Raises:
            LeftError: the transfer broke somewhere else, and the actor said so; see `leaving`.
        """
        with _digested(self.model, self.digest), until_left(self.shutdown):
            super().receive_weights(update_info)
        if self.model_update_group is None:
            raise LeftError("the weight transfer was left before its end")


class CheckedIpcEngine(IPCWeightTransferEngine):
    def start_weight_update(self) -> None:
        self.digest = Digest()
        forget_half_loaded(self.model)
        super().start_weight_update()

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        with _digested(self.model, self.digest):
            super().receive_weights(update_info)


class TransferExtension:
    """The methods mixed into vLLM's worker (`worker_extension_cls`)."""

    weight_transfer_engine: Any
    _weight_update_active: bool
    """vLLM's own: between the start of an update and its end."""

    def weight_transfer_leave(self) -> None:
        """Leave a transfer that broke; see `leaving`."""
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()
        self.weight_transfer_engine.shutdown()

    def weight_transfer_digest(self) -> str:
        """The digest of what this worker received for the update in progress (nccl, ipc)."""
        return str(self.weight_transfer_engine.digest.hex())

    def weight_transfer_share(self, address: Address) -> bool:
        """See `GlooEngine.share`."""
        return bool(self.weight_transfer_engine.share(address))

    def weight_transfer_stage(self) -> None:
        """See `GlooEngine.stage`."""
        self.weight_transfer_engine.stage()

    def weight_transfer_staged(self) -> bool:
        """See `GlooEngine.staged`."""
        return bool(self.weight_transfer_engine.staged())


def register() -> None:
    """Register the backends with vLLM in this process. Repeated calls are harmless."""
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
        WeightTransferTrainerFactory.register_engine("nccl_checked", "actors.weights.gpu", "NcclTrainer")
        WeightTransferTrainerFactory.register_engine("ipc_checked", "actors.weights.gpu", "IpcTrainer")
