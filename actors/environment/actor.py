"""One environment worker: it holds the places of live episodes, and those who hold them to a sign of life.

Every method answers with a dictionary; what failed is in it as `failed: [status, detail]`, since an exception would lose its parts
on its way through Ray.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable
from typing import Any

from actors.environment.hosts import Host, Hosts
from actors.environment.messages import Describe, End, Step, ToolUse
from actors.environment.process import EnvironmentProcess
from actors.runtime import own_process, use_batch_scheduling
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.episodes.calls import ToolCall
from grpo_ray.episodes.episode import EnvironmentFailedError
from grpo_ray.errors import RewardError

SILENT_S = 60.0
"""A sampler that gives no sign of life for this long has died, and the places that it holds are free again."""
DESCRIBE_S = 120.0


class EnvironmentActor:
    """An environment worker, made into a Ray actor by `EnvironmentPool`. `start` has to be called first."""

    def __init__(
        self,
        config: EnvironmentConfig,
        functions: tuple[RewardFunctionConfig, ...],
        run_dir: str,
        name: str,
        start_timeout_s: float,
    ) -> None:
        self._log = own_process(run_dir, name)
        use_batch_scheduling()
        self._config = config
        self._functions = functions
        self._start_timeout_s = start_timeout_s
        self._hosts = Hosts(config, self._make)
        self._seen: dict[str, float] = {}
        """When each sampler last gave a sign of life."""
        self._tickets: dict[int, str] = {}
        """Ticket -> the sampler that holds it."""
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> dict[str, Any]:
        """Import every class in a process of its own, which describes them (and needs Transformers for that); returns `pid` and
        `described`.

        Raises:
            RewardError: naming the class or tool that can't be used.
        """
        host = Host(self._make(), -1)
        try:
            await host.on_thread(host.process.start)
            told = await host.call(Describe(), DESCRIBE_S, "reset_timeout_s", host.process.life)
        except EnvironmentFailedError as e:
            raise RewardError(f"{e.detail} (log: {self._log})") from None
        except RewardError as e:
            raise RewardError(f"{e} (log: {self._log})") from None
        finally:
            await host.close()
        self._watch = asyncio.create_task(self._free_the_silent())
        # The others would only import what reward functions need.
        self._functions = tuple(f for f in self._functions if f.title in told["functions"])
        return {"pid": os.getpid(), "described": told["described"]}

    def _make(self) -> EnvironmentProcess:
        return EnvironmentProcess(self._config, self._functions, self._start_timeout_s)

    async def ping(self) -> None:
        """Answer at any time: environments have threads and processes of their own."""

    async def hold(self, sampler: str) -> None:
        """Take note that the sampler is alive."""
        self._seen[sampler] = time.monotonic()

    async def acquire(self, sampler: str) -> int:
        """Take a place, when one is free. Returns its ticket."""
        self._seen[sampler] = time.monotonic()
        ticket = await self._hosts.acquire()
        self._tickets[ticket] = sampler
        return ticket

    async def begin(self, ticket: int, environment: str, row: bytes, seed: int) -> dict[str, Any]:
        """Begin an episode: `observation`."""
        return await _told(self._hosts.begin(ticket, environment, row, seed))

    async def step(self, ticket: int, action: str) -> dict[str, Any]:
        """Play an action of a text game: `messages`, `reward`, `done`."""
        return await _told(self._hosts.use(ticket, lambda place: Step(place, action)))

    async def call(self, ticket: int, call: ToolCall) -> dict[str, Any]:
        """Answer a tool call: `content`, `error`."""
        return await _told(self._hosts.use(ticket, lambda place: ToolUse(place, call)))

    async def end(self, ticket: int, inputs: bytes) -> dict[str, Any]:
        """Compute the rewards of an episode: `reward`, `scores`."""
        return await _told(self._hosts.use(ticket, lambda place: End(place, inputs)))

    async def release(self, ticket: int) -> None:
        """Give a place back, whatever goes on there."""
        self._tickets.pop(ticket, None)
        await self._hosts.release(ticket)

    async def counts(self) -> dict[str, int]:
        """The number of places that are `held`, and of `processes` that run."""
        running = sum(process.pid is not None for process in self._hosts.processes)
        return {"held": self._hosts.num_held, "processes": running}

    async def stop(self) -> None:
        """End every process, also in the middle of a call."""
        if self._watch is not None:
            self._watch.cancel()
        await self._hosts.close()

    async def _free_the_silent(self) -> None:
        while True:
            await asyncio.sleep(SILENT_S / 4)
            now = time.monotonic()
            silent = [t for t, sampler in self._tickets.items() if now - self._seen.get(sampler, 0.0) > SILENT_S]
            for ticket in silent:
                await self.release(ticket)


async def _told(answer: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await answer
    except EnvironmentFailedError as e:
        return {"failed": [e.status.value, e.detail]}
