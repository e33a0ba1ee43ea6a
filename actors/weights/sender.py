"""The learner's end of a weight sync: a view of the weights under ZeRO with bounded memory, and the sender."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferUpdatePayload,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from actors.deaths import fate
from actors.weights import backend as weight_backend
from actors.weights.buckets import DigestSource
from actors.weights.gloo_trainer import GlooTrainerInitInfo
from actors.weights.memory import Address
from actors.weights.protocol import SENDERS_PART, EngineSyncError, EngineTarget, SendReport
from actors.zero import gathered
from grpo_ray.errors import DeadlineError, GrpoRayError, WorkerError
from grpo_ray.models.named_weights import buckets, named_weights


class ZeroWeightSource(WeightSource):
    """A module's weights under Hugging Face names, adapters merged in, gathered bucket by bucket under ZeRO-3: every rank must
    then iterate, in step with the others.

    Args:
        module: what engines run, e.g. `engine.module.hf`. A tied lm_head is the embedding's own parameter and appears once.
        bucket_bytes: the size of whole parameters that exist at once, in the learner's dtype.
        dtype: the dtype of what is sent.
    """

    def __init__(self, module: torch.nn.Module, bucket_bytes: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._bucket_bytes = bucket_bytes
        self._weights = named_weights(module)
        self._pass: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(w.name, self.dtype, w.shape) for w in self._weights]

    def num_bytes(self) -> int:
        """The bytes of one transfer."""
        return sum(w.shape.numel() for w in self._weights) * self.dtype.itemsize

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._walk()
        return self._pass

    def finish_pass(self) -> None:
        """Iterate to the end of what a failed transfer left half-way (or never began): the other ranks gather in the same order
        and would wait for this one for ever."""
        for _ in self._pass or self._walk():
            pass
        self._pass = None

    def _walk(self) -> Iterator[tuple[str, Tensor]]:
        for bucket in buckets(self._weights, self._bucket_bytes):
            with gathered([p for w in bucket for p in w.parts]):
                for weight in bucket:
                    yield weight.name, weight.value().to(self.dtype)


class EngineClient:
    """vLLM's `VLLMWeightSyncClient` over Ray handles. Each call goes to all engines; the error names the first that fails, or does
    not answer before the deadline."""

    def __init__(self, targets: list[EngineTarget], source: DigestSource) -> None:
        self.targets = targets
        self.source = source
        self.version = 0
        self.timeout_s = 0.0
        self._deadline = 0.0

    def start_clock(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.join(self.targets, init_info)

    def join(self, targets: list[EngineTarget], init_info: dict[str, Any]) -> None:
        """Make these engines join a transfer group, where there is one, with consecutive ranks from `rank_offset`."""
        calls = {}
        rank = init_info.get("rank_offset")
        for target in targets:
            calls[target.name] = (init_info if rank is None else {**init_info, "rank_offset": rank},)
            rank = None if rank is None else rank + target.world_size
        self._call("init_weight_transfer_engine", calls)

    def share(self, address: Address) -> list[EngineTarget]:
        shares = self._call_all("share_memory", address)
        return [target for target in self.targets if shares[target.name]]

    def are_here(self, targets: list[EngineTarget]) -> bool:
        own = ray.get_runtime_context().get_node_id()
        return set(self._call("node", {target.name: () for target in targets}).values()) <= {own}

    def start_weight_update(self) -> None:
        self._call_all("start_weight_update")

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self._call_all("update_weights", update_info)

    def stage(self) -> None:
        self._call_all("stage_weights")

    def wait_staged(self) -> None:
        self._call_all("wait_staged")

    def finish_weight_update(self, _weight_version: str | None = None) -> None:
        """Finish with the sync's own version; vLLM's trainer engines don't pass one."""
        self._call_all("finish_weight_update", self.version, self.source.digest.hex())

    def _call_all(self, method: str, *args: Any) -> dict[str, Any]:
        return self._call(method, {target.name: args for target in self.targets})

    def _call(self, method: str, arguments: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Call the engines; arguments and results are by their names."""
        handles = {target.name: target.handle for target in self.targets}
        names = {getattr(handles[name], method).remote(*args): name for name, args in arguments.items()}
        answers: dict[str, Any] = {}
        waiting = list(names)
        while waiting:
            left = self._deadline - time.monotonic()
            done, waiting = ray.wait(waiting, num_returns=1, timeout=max(left, 0.0))
            if not done:
                late = ", ".join(names[ref] for ref in waiting)
                raise DeadlineError(
                    f"weight sync: {late} did not answer {method} within {self.timeout_s:g} s; see logs/, or raise deadlines.sync_s"
                )
            for ref in done:
                try:
                    answers[names[ref]] = ray.get(ref)
                except (RayError, WorkerError) as e:
                    raise EngineSyncError(
                        f"weight sync: {names[ref]} failed in {method}: {fate(e, names[ref])}; see logs/{names[ref]}.log"
                    ) from None
        return answers


class WeightSender:
    """The sender of weights in every learner rank. Rank 0 sends; the others take part in gathering.

    A transfer fails on rank 0 when an engine dies, or at three quarters of `timeout_s` when one hangs. The ranks stay in step then,
    and another transfer may follow.
    """

    def __init__(self, source: ZeroWeightSource, rank: int, backend: str, bucket_bytes: int, timeout_s: float) -> None:
        if backend not in weight_backend.WORKER_BACKENDS:
            raise ValueError(f"weight backend is {backend!r}, expected one of {sorted(weight_backend.WORKER_BACKENDS)}")
        weight_backend.register()
        self.rank = rank
        self.backend = backend
        # No tensor is divided, and the buffer of ipc takes none that is larger.
        largest = max(math.prod(m.shape) * m.dtype.itemsize for m in source.metadata())
        self._bucket_bytes = bucket_bytes if backend == "gloo" else max(bucket_bytes, largest)
        self._timeout_s = timeout_s * SENDERS_PART
        self._zero_source = source
        self._source = DigestSource(source)
        self._client: EngineClient | None = None
        self._engine: TrainerWeightTransferEngine | None = None
        self._generation = -1

    def connect(self, targets: list[EngineTarget], generation: int) -> None:
        """Form the transfer group with these engines, unless this generation is already joined.

        Raises:
            DeadlineError, WorkerError: an engine failed; the message names it.
        """
        if generation == self._generation:
            return
        self.close()
        self._client = EngineClient(targets, self._source)
        self._client.start_clock(self._timeout_s)
        try:
            self._engine = WeightTransferTrainerFactory.trainer_init(
                self._init_info(targets), client=self._client, source=self._source
            )
        except (OSError, RuntimeError) as e:
            if isinstance(e, GrpoRayError):
                raise
            raise EngineSyncError(f"weight sync: no transfer group with {self._names()}: {e}") from e
        self._generation = generation

    def send(self, version: int) -> SendReport:
        """Send every connected engine the current weights, labelled `version`. With gloo they are only staged there, while
        sampling goes on, and `RolloutActor.load_staged` swaps them in.

        Raises:
            DeadlineError, WorkerError: an engine failed; the message names it. Without gloo, engines already reached are unusable.
        """
        if self._engine is None or self._client is None:
            raise WorkerError("weights_send before weights_connect: no engine is connected")
        self._client.version = version
        self._client.start_clock(self._timeout_s)
        started = time.monotonic()
        try:
            self._engine.send_weights()
        except (OSError, RuntimeError) as e:
            self.close()
            if isinstance(e, GrpoRayError):
                raise
            raise EngineSyncError(f"weight sync: the transfer to {self._names()} broke: {e}") from e
        finally:
            self._zero_source.finish_pass()
        return SendReport(
            seconds=time.monotonic() - started,
            bytes=self._zero_source.num_bytes() if self.rank == 0 else 0,
            checksum=self._source.digest.hex(),
        )

    def close(self) -> None:
        """Leave the transfer group."""
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None
        self._generation = -1

    def _names(self) -> str:
        return ", ".join(t.name for t in self._client.targets) if self._client else "no engine"

    def _init_info(self, targets: list[EngineTarget]) -> TrainerInitInfo:
        match self.backend:
            case "gloo":
                return GlooTrainerInitInfo(self._bucket_bytes, self._timeout_s, rank=self.rank)
            case "nccl":
                from actors.weights.gpu import NcclTrainerInitInfo

                world_size = 1 + sum(t.world_size for t in targets)
                return NcclTrainerInitInfo(world_size, self._bucket_bytes, rank=self.rank)
            case _:
                from actors.weights.gpu import IpcTrainerInitInfo

                return IpcTrainerInitInfo(packed=True, packed_buffer_size_bytes=self._bucket_bytes, rank=self.rank)
