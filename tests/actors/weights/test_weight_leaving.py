"""Transfers between GPUs that break, and buffers of every size: our ends and vLLM's, over memory of the host and communicators that
wait as NCCL does, without end, for a process that is gone."""

from __future__ import annotations

import base64
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine, packed_tensor
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo

from actors.rollout.vllm_options import rollout_env
from actors.weights import gpu
from actors.weights.backend import CheckedNcclEngine
from actors.weights.buckets import Digest, DigestSource
from actors.weights.gpu import IpcTrainer, IpcTrainerInitInfo, NcclTrainer, NcclTrainerInitInfo
from actors.weights.leaving import Group, LeftError, leave_file
from actors.weights.protocol import EngineSyncError
from actors.weights.sender import WeightSender, ZeroWeightSource
from grpo_ray.config.learner import WeightsConfig
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.models.files.tiny import build_tiny_model
from tests.actors.weights.test_weight_gloo import Source
from tests.actors.weights.test_weight_gpu import Calls

LIMIT_S = 120.0
BUFFER = 6400
"""The bytes of the largest weight of `Source`: two buckets of NCCL's, three of IPC's."""


class Buffers:
    """What vLLM's packed transfer does on a GPU, with memory of the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        empty = torch.empty
        stream = SimpleNamespace(synchronize=lambda: None)
        monkeypatch.setattr(torch, "empty", lambda *size, **kw: empty(*size, **kw | {"device": "cpu"}))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(packed_tensor, "_get_streams", lambda _, number: (stream,) * number)
        monkeypatch.setattr(packed_tensor, "reduce_tensor", lambda buffer: (None, (buffer,)))


def model_with_large_embeddings() -> ZeroWeightSource:
    module = torch.nn.ModuleDict({"embed": torch.nn.Embedding(3000, 100), "head": torch.nn.Linear(10, 10)})
    return ZeroWeightSource(module, 1 << 20, torch.bfloat16)


def test_a_tensor_above_the_bucket_fits_the_buffer_of_a_shared_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Buffers(monkeypatch)
    source = model_with_large_embeddings()
    info = WeightSender(source, 0, "ipc", 64 << 10, 60.0)._init_info([])
    assert isinstance(info, IpcTrainerInitInfo)
    assert info.packed_buffer_size_bytes == 2 * 3000 * 100
    chunks = packed_tensor.packed_ipc_producer(
        iter(source), "GPU-0", lambda item: item[1], info.packed_buffer_size_bytes
    )
    names = [name for chunk in chunks for name in chunk.names]
    assert names == [m.name for m in source.metadata()]
    with pytest.raises(ValueError, match="exceeds buffer_size_bytes"):
        list(packed_tensor.packed_ipc_producer(iter(source), "GPU-0", lambda item: item[1], 64 << 10))


@pytest.mark.parametrize(("backend_name", "mib"), [("gloo", 64), ("nccl", 1024), ("ipc", 1024)])
def test_weights_travel_in_pieces_of_a_gibibyte_between_gpus(backend_name: str, mib: int) -> None:
    assert WeightsConfig().bucket_bytes(backend_name) == mib << 20
    assert WeightsConfig(bucket_mb=7).bucket_bytes(backend_name) == 7 << 20


class Waits:
    """A communicator whose second broadcast waits for a process that is gone, until it is ended."""

    world_size = 3

    def __init__(self, before: int = 1) -> None:
        self.before = before
        self.sent = 0
        self.ended = threading.Event()
        self.waiting = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        self.sent += 1
        if self.sent > self.before:
            self.waiting.set()
            assert self.ended.wait(LIMIT_S), "nobody has ended the broadcast"

    def destroy(self) -> None:
        self.ended.set()


class DyingEngines(Calls):
    """Engines of which one dies in mid-broadcast."""

    def __init__(self, group: Waits) -> None:
        super().__init__()
        self.group = group

    def update_weights(self, update_info: Any) -> None:
        assert self.group.waiting.wait(LIMIT_S)
        raise EngineSyncError("weight sync: rollout-1 failed in update_weights: its engine core died")


def test_a_sender_that_waits_in_a_broadcast_for_a_dead_engine_is_freed_and_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Buffers(monkeypatch)
    group, source = Waits(), DigestSource(Source())
    trainer = NcclTrainer(
        client=DyingEngines(group), source=source, is_sender=True, packed=True, packed_buffer_size_bytes=BUFFER
    )
    trainer.model_update_group = Group(group)
    began = time.monotonic()
    with pytest.raises(EngineSyncError, match="rollout-1 failed in update_weights"):
        trainer.send_weights()
    assert time.monotonic() - began < 20
    assert group.ended.is_set()
    assert group.sent == 2, "nothing is broadcast into a group that has ended"


def test_a_sender_does_not_wait_for_an_engine_that_never_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses(Calls):
        def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
            raise EngineSyncError("weight sync: rollout-1 failed in init_weight_transfer_engine")

    forever = threading.Event()
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(gpu, "uid_init_process_group", lambda *_: forever.wait(60.0))
    trainer = NcclTrainer(client=Refuses(), source=DigestSource(Source()), packed=True, packed_buffer_size_bytes=BUFFER)
    try:
        with pytest.raises(EngineSyncError, match="rollout-1"):
            trainer._connect(NcclTrainerInitInfo(3, 4, rank=0), secrets.token_bytes(128))
    finally:
        forever.set()


class Model(torch.nn.Module):
    def load_weights(self, weights: Any) -> None:
        pass


def receiver(folder: Path, monkeypatch: pytest.MonkeyPatch, groups: list[Waits]) -> CheckedNcclEngine:
    """As in a vLLM worker, with a model that takes anything."""
    Buffers(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda *_: groups.pop(0))
    engine = CheckedNcclEngine.__new__(CheckedNcclEngine)
    engine.model = Model()
    engine.device = torch.device("cpu")
    engine.parallel_config = None
    engine.model_update_group = None
    engine.digest = Digest()
    return engine


INIT = NCCLWeightTransferInitInfo(
    rank_offset=1,
    world_size=3,
    nccl_unique_id_b64=base64.b64encode(secrets.token_bytes(128)).decode(),
    packed=True,
    packed_buffer_size_bytes=4,
)
UPDATE = NCCLWeightTransferUpdateInfo(["a", "b", "c"], ["float32"] * 3, [[2], [3], [4]])


@pytest.mark.parametrize("before", [0, 1, 2])
def test_an_engine_that_waits_for_a_sender_that_stopped_leaves_when_its_actor_says_so(
    before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Waits(before)
    engine = receiver(tmp_path, monkeypatch, [group])
    engine.init_transfer_engine(INIT)

    def say() -> None:
        assert group.waiting.wait(LIMIT_S)
        leave_file().touch()

    threading.Thread(target=say, daemon=True).start()
    with pytest.raises(LeftError):
        engine.receive_weights(UPDATE)
    assert group.ended.is_set()
    assert group.sent == before + 1
    assert leave_file().parent == tmp_path


@pytest.mark.parametrize("late", [False, True])
def test_an_engine_leaves_a_group_that_is_never_complete_and_joins_the_next(
    late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: the wait for the first group ends after all, when nobody wants it any more."""
    second = Waits(99)
    engine = receiver(tmp_path, monkeypatch, [])
    joining, complete, over = threading.Event(), threading.Event(), threading.Event()

    def never_complete(*_: Any) -> Waits:
        joining.set()
        complete.wait(2 * LIMIT_S)
        over.set()
        return Waits(0)

    def say() -> None:
        assert joining.wait(LIMIT_S)
        leave_file().touch()

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", never_complete)
    threading.Thread(target=say, daemon=True).start()
    try:
        with pytest.raises(LeftError, match="while its group was being formed"):
            engine.init_transfer_engine(INIT)
        leave_file().unlink()
        monkeypatch.setattr(nccl_engine, "worker_init_process_group", lambda *_: second)
        engine.init_transfer_engine(INIT)
        if late:
            complete.set()
            assert over.wait(LIMIT_S)
        engine.receive_weights(UPDATE)
        assert second.sent == 3
    finally:
        complete.set()


def test_an_engine_joins_a_group_on_the_gpu_of_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own begins with the first GPU, which is another worker's."""
    engine = receiver(tmp_path, monkeypatch, [])
    engine.device = torch.device("cuda", 3)
    of_thread, joined = threading.local(), []
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: setattr(of_thread, "index", index))

    def join(*_: Any) -> Waits:
        joined.append(of_thread.index)
        return Waits()

    monkeypatch.setattr(nccl_engine, "worker_init_process_group", join)
    engine.init_transfer_engine(INIT)
    assert joined == [3]
    assert (engine.packed, engine.packed_buffer_size_bytes) == (INIT.packed, INIT.packed_buffer_size_bytes)
    assert engine.packed_num_buffers == INIT.packed_num_buffers


def test_an_engine_leaves_its_old_group_before_it_joins_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Waits(99), Waits(99)
    groups = [first, second]
    engine = receiver(tmp_path, monkeypatch, groups)
    engine.init_transfer_engine(INIT)
    monkeypatch.setattr(
        nccl_engine, "worker_init_process_group", lambda *_: groups.pop(0) if first.ended.is_set() else None
    )
    engine.init_transfer_engine(INIT)
    engine.receive_weights(UPDATE)
    assert (first.sent, second.sent, second.ended.is_set()) == (0, 3, False)


def test_ranks_of_a_shared_gpu_gather_to_the_end_when_an_engine_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the others wait for the sender in the next bucket's collective."""
    Buffers(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    told: list[str] = []

    class Fails(Calls):
        def update_weights(self, update_info: Any) -> None:
            told.append("update")
            if len(told) == 2:
                raise EngineSyncError("weight sync: rollout-1 failed in update_weights")

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            told.append("finish")

    trainer = IpcTrainer(client=Fails(), source=DigestSource(Source()), packed=True, packed_buffer_size_bytes=BUFFER)
    gathered: list[int] = []
    gather = trainer._all_gather_and_merge_handles

    def counted(handles: Any) -> Any:
        gathered.append(1)
        return gather(handles)

    monkeypatch.setattr(trainer, "_all_gather_and_merge_handles", counted)
    with pytest.raises(EngineSyncError, match="rollout-1"):
        trainer.send_weights()
    assert told == ["update"] * 2
    assert len(gathered) == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stop", [0, 3])
def test_an_engine_that_left_a_transfer_samples_with_the_whole_of_the_next(
    stop: int, tiny_model: Path, tmp_path: Path
) -> None:
    """A real vLLM model, some of whose layers have their weights from the transfer that broke, some a part of them."""
    tiny = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, context=256, seed=21)
    other = build_tiny_model(tmp_path / "other", tiny)
    env = dict(os.environ) | rollout_env(RolloutConfig(), on_gpu=False, backend="nccl")
    done = subprocess.run(
        [sys.executable, "-m", "tests.actors.weights.left", str(tiny_model), str(other), str(stop)],
        env=env | {"TORCH_COMPILE_DISABLE": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["left"], told["same_digest"]) == (True, True)
    assert told["buckets"][0] == stop < told["buckets"][1]
    assert told["apart"] < 1e-4
