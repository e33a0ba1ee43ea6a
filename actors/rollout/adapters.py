"""The adapters that one vLLM engine holds, each under its policy version.

A request keeps the adapter that it began with, whatever is loaded meanwhile; an adapter is dropped when it is neither current
nor in use. vLLM finds adapters by their id and keys its prefix cache by their name and path, so each gets all three for itself:
the cache of one version is never used for another.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from grpo_ray.config.model import LoraConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import WorkerError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


@dataclass(frozen=True)
class AdapterOptions:
    """What an engine has to know before it gets its first adapter."""

    lora: LoraConfig
    max_versions: int
    """The number of adapters that the engine has room for."""

    @classmethod
    def of(cls, config: RunConfig) -> Self | None:
        """The options of a run; None: rollout engines get whole weights.

        Samples in progress are of the last `max_staleness` versions at most, and the current one stays while a new one loads, used
        or not.
        """
        if config.model.lora is None or not config.model.sends_adapters:
            return None
        return cls(config.model.lora, max(config.algorithm.max_staleness, 1) + 1)


def lora_args(options: AdapterOptions) -> dict[str, Any]:
    """The engine's options. vLLM supports certain ranks only: the next allowed one is taken, and the rest is zeros."""
    from vllm.config.lora import MaxLoRARanks

    rank = min(allowed for allowed in get_args(MaxLoRARanks) if allowed >= options.lora.r)
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": options.max_versions}


@dataclass(eq=False)
class Adapter:
    version: int
    request: LoRARequest
    num_users: int = 0


class EngineAdapters:
    """The adapters of one AsyncLLM; all methods belong to its event loop."""

    def __init__(self, engine: Any, options: AdapterOptions | None, base_model: str, name: str) -> None:
        self._engine = engine
        self._options = options
        self._base_model = base_model
        self._name = name
        self._ids = itertools.count(1)
        self._held: list[Adapter] = []
        self._removals: set[asyncio.Task[None]] = set()
        self._current: Adapter | None = None

    @contextmanager
    def use(self) -> Iterator[Adapter | None]:
        """The current adapter, for one request; it stays in the engine until the end of the block. None: the bare model."""
        adapter = self._current
        if adapter is None:
            yield None
            return
        adapter.num_users += 1
        try:
            yield adapter
        finally:
            adapter.num_users -= 1
            self._drop_unused()

    async def load(self, version: int, checksum: str, data: bytes) -> float:
        """Make this adapter (`lora.adapter_bytes`) the current one.

        Returns:
            The seconds that vLLM took, during which it samples nothing.

        Raises:
            WorkerError: the checksum differs, or there is no room.
        """
        from grpo_ray.models.lora import adapter_checksum

        assert self._options is not None
        received = adapter_checksum(data)
        if received != checksum:
            raise WorkerError(f"{self._name} received an adapter with checksum {received}, the learner sent {checksum}")
        if len(self._held) >= self._options.max_versions:
            held = ", ".join(str(a.version) for a in self._held)
            raise WorkerError(
                f"{self._name} still samples with the adapters of versions {held} and has room for "
                f"{self._options.max_versions}; version {version} came too early"
            )
        with tempfile.TemporaryDirectory() as folder:
            await asyncio.to_thread(self._write, data, Path(folder))
            adapter = Adapter(version, self._request(version, folder))
            started = time.monotonic()
            await self._engine.add_lora(adapter.request)
            seconds = time.monotonic() - started
        self._held.append(adapter)
        self._current = adapter
        self._drop_unused()
        return seconds

    def _write(self, data: bytes, folder: Path) -> None:
        from safetensors.torch import load

        from grpo_ray.models.lora import write_adapter

        assert self._options is not None
        write_adapter(load(data), self._options.lora, self._base_model, folder)

    def _request(self, version: int, folder: str) -> LoRARequest:
        from vllm.lora.request import LoRARequest

        number = next(self._ids)
        return LoRARequest(lora_name=f"version-{version}-{number}", lora_int_id=number, lora_path=folder)

    def _drop_unused(self) -> None:
        for adapter in [a for a in self._held if a is not self._current and not a.num_users]:
            self._held.remove(adapter)
            removal = asyncio.create_task(self._remove(adapter))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)

    async def _remove(self, adapter: Adapter) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        # The pool learns of a dead engine by `poll`.
        with suppress(EngineDeadError):
            await self._engine.remove_lora(adapter.request.lora_int_id)
