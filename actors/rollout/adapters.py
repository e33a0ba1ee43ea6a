"""The adapters that one vLLM engine holds, each under the policy version that it is.

A request keeps the adapter that it began with, whatever is loaded meanwhile; an adapter goes when it is neither the current one
nor in use. vLLM finds adapters by their id and keys its prefix cache by their name and path, so each gets all three for itself:
what one version left in the cache is never taken for another's.
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
    """Adapters that it has room for."""

    @classmethod
    def of(cls, config: RunConfig) -> Self | None:
        """None: samplers get whole weights.

        Samples under way are of the last `max_staleness` versions at most, and while a new one comes the current one stays, used
        or not.
        """
        if config.model.lora is None or not config.model.sends_adapters:
            return None
        return cls(config.model.lora, max(config.algorithm.max_staleness, 1) + 1)


def lora_args(options: AdapterOptions) -> dict[str, Any]:
    """The engine's options. vLLM takes certain ranks only: the next one that is allowed, the rest is zeros."""
    from vllm.config.lora import MaxLoRARanks

    rank = min(allowed for allowed in get_args(MaxLoRARanks) if allowed >= options.lora.r)
    return {"enable_lora": True, "max_lora_rank": rank, "max_loras": options.max_versions}


@dataclass(eq=False)
class Adapter:
    version: int
    request: LoRARequest
    num_users: int = 0


class EngineAdapters:
    """Of one AsyncLLM; all methods belong to its event loop."""

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
            Seconds that vLLM took; it samples nothing meanwhile.

        Raises:
            WorkerError: the checksum is another, or there is no room.
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

        # Of a dead engine the pool hears by `poll`.
        with suppress(EngineDeadError):
            await self._engine.remove_lora(adapter.request.lora_int_id)
