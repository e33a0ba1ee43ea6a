"""How the nccl and ipc transfers are formed, as far as that shows without a GPU; gpu/test_weights_gpu.py has the transfers."""

from __future__ import annotations

import base64
import inspect
import secrets
from typing import Any

import psutil
import pytest
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo

from actors.rendezvous import TEXT_BYTES
from actors.weights import backend
from actors.weights.buckets import DigestSource
from actors.weights.gpu import IpcTrainerInitInfo, NcclTrainer, NcclTrainerInitInfo, handle_text, read_handle
from tests.actors.weights.test_weight_gloo import Source


class Calls:
    """What the engines are told by actor calls."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.told.append(init_info)

    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, _weight_version: str | None = None) -> None: ...


def test_the_id_of_nccl_goes_to_the_engines_by_calls_alone_and_no_port_is_opened_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_DISABLE_PYNCCL", "1")
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    before = listening()
    calls, unique_id = Calls(), secrets.token_bytes(128)
    trainer = NcclTrainer(
        client=calls, source=DigestSource(Source()), is_sender=True, packed=True, packed_buffer_size_bytes=4096
    )
    trainer._connect(NcclTrainerInitInfo(3, 4096, rank=0), unique_id)
    (told,) = calls.told
    assert base64.b64decode(told["nccl_unique_id_b64"]) == unique_id
    assert not {"master_address", "master_port"} & set(told)
    # As vLLM's worker reads it.
    read = NCCLWeightTransferInitInfo(**told)
    assert (read.nccl_unique_id_bytes, read.world_size, read.rank_offset) == (unique_id, 3, 1)
    assert (read.packed, read.packed_buffer_size_bytes) == (True, 4096)
    assert told["nccl_unique_id_b64"] not in repr(read)
    assert trainer.model_update_group.world_size == 3
    assert listening() == before


def listening() -> set[int]:
    connections = psutil.Process().net_connections("inet")
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def test_the_sender_forms_the_transfers_of_gpus_by_these_ends() -> None:
    backend.register()
    for info in (NcclTrainerInitInfo(2, 1, rank=0), IpcTrainerInitInfo(rank=0)):
        trainer = WeightTransferTrainerFactory._registry[info.backend]()
        assert trainer.__module__ == "actors.weights.gpu"
        assert info.backend in backend.WORKER_BACKENDS.values()


def test_the_handle_of_a_buffer_on_a_gpu_travels_as_text() -> None:
    plain = (0, secrets.token_bytes(66), 1 << 30, 512, False, b"/torch_123_4567_0", 3, secrets.token_bytes(64), True)
    args = (torch.Tensor, torch.Size([1 << 30]), (1,), 0, torch.storage.TypedStorage, torch.uint8, *plain)
    assert len(args) == len(inspect.signature(rebuild_cuda_tensor).parameters)
    text = handle_text({"GPU-5f3c": args})
    assert len(text.encode()) < TEXT_BYTES / 2
    assert read_handle(text) == {"GPU-5f3c": args}
    with pytest.raises(TypeError, match=r"not in a Tensor of torch\.float32"):
        handle_text({"GPU-5f3c": (*args[:5], torch.float32, *plain)})
