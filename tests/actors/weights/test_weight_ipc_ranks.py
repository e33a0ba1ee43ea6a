"""Weights to an engine of several GPUs over CUDA IPC: our end in each rank and vLLM's in each of the engine's workers, over memory
of the host. gpu/test_colocated_gpu.py has it on GPUs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter, packed_ipc_consumer

from actors.weights import gpu
from actors.weights.buckets import DigestSource
from actors.weights.gpu import IpcTrainer
from tests.actors.weights.test_weight_gloo import Source
from tests.actors.weights.test_weight_gpu import Calls
from tests.actors.weights.test_weight_leaving import BUFFER, Buffers

RANKS = 4
LIMIT_S = 60.0


class OfRank(Source):
    """Weights by which a reader knows the rank whose buffer it read: their sum with the rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight + self._rank) for name, weight in self.weights().items())


@dataclass
class World:
    """Ranks as threads, each with a buffer on its own GPU, and what a collective takes from one to the others."""

    buffers: dict[int, Tensor] = field(default_factory=dict)
    texts: list[str] = field(default_factory=lambda: [""] * RANKS)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(RANKS, timeout=LIMIT_S))
    own: threading.local = field(default_factory=threading.local)

    def export(self, buffer: Tensor) -> tuple[None, tuple[Any, ...]]:
        """What torch says of a buffer on the GPU of this rank, as `reduce_tensor` does."""
        rank = self.own.rank
        self.buffers[rank] = buffer
        plain = (rank, bytes([rank]), buffer.numel(), 0, True, b"counter", 0, b"event", True)
        shape = (torch.Tensor, torch.Size([buffer.numel()]), (1,), 0)
        return None, (*shape, torch.storage.TypedStorage, torch.uint8, *plain)

    def gather(self, text: str, _device: torch.device) -> list[str]:
        self.texts[self.own.rank] = text
        self.barrier.wait()
        found = list(self.texts)
        self.barrier.wait()
        return found


class Workers(Calls):
    """The workers of one engine, which read what they are told as vLLM does; worker w is on the GPU of rank w."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.loaded: list[dict[str, Tensor]] = [{} for _ in range(RANKS)]
        self.buckets = 0
        monkeypatch.setattr(PackedBufferImporter, "rebuild", lambda _, args: world.buffers[args[7][0]])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"GPU-{gpu}"))

    def update_weights(self, update_info: Any) -> None:
        self.buckets += 1
        told = {name: update_info[name] for name in ("names", "shapes", "dtype_names", "tensor_sizes")}
        for worker, loaded in enumerate(self.loaded):
            loaded |= packed_ipc_consumer(update_info["ipc_handles"], **told, device_index=worker)


def test_each_worker_reads_all_weights_from_the_rank_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Buffers(monkeypatch)
    world = World()
    workers = Workers(world, monkeypatch)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", world.export)
    monkeypatch.setattr(gpu, "gather_texts", world.gather)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: world.own.rank)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: RANKS)
    monkeypatch.setattr(dist, "barrier", lambda: world.barrier.wait())

    def send(rank: int) -> None:
        world.own.rank = rank
        IpcTrainer(
            client=workers,
            source=DigestSource(OfRank(rank)),
            is_sender=rank == 0,
            packed=True,
            packed_buffer_size_bytes=BUFFER,
        ).send_weights()

    with ThreadPoolExecutor(RANKS) as ranks:
        for sent in [ranks.submit(send, rank) for rank in range(RANKS)]:
            sent.result(LIMIT_S)
    assert workers.buckets > 1
    for rank, loaded in enumerate(workers.loaded):
        expected = dict(OfRank(rank))
        assert loaded.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0)
