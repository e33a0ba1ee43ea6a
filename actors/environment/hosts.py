"""The processes of one environment worker, and who holds which instance.

    acquire -> Place -> begin, use.. , end -> release

A place is one live episode. Its process runs one call at a time; a call that is late ends the process, and with it every instance
there: whoever holds one learns it at its next call.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from actors.environment.messages import Begin, Request
from actors.environment.process import EnvironmentProcess
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.episodes.episode import EnvironmentFailedError
from grpo_ray.errors import RewardError
from grpo_ray.types import ScoreStatus

LEAVE_ALL_S = 2.0
"""The time for a worker's processes to end in good order."""


class Host:
    """One process, with a thread of its own."""

    def __init__(self, process: EnvironmentProcess, index: int) -> None:
        self.process = process
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"environments-{index}")

    async def call(self, request: Request, limit_s: float, option: str, life: int) -> dict[str, Any]:
        """Make a call, in its turn; see `EnvironmentProcess.call`. `life`: that of the child which has the instance."""
        answer: dict[str, Any] = await self.on_thread(lambda: self._call(request, limit_s, option, life))
        return answer

    def _call(self, request: Request, limit_s: float, option: str, life: int) -> dict[str, Any]:
        if life != self.process.life:
            raise EnvironmentFailedError(
                ScoreStatus.CRASHED,
                "the environment was lost with its process, in which another one hung or crashed; "
                "environment.envs_per_process 1 gives each a process of its own",
            )
        return self.process.call(request, limit_s, option)

    async def on_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def end(self) -> None:
        """End the process, also in the middle of a call; the next call starts another."""
        await asyncio.to_thread(self.process.stop)
        await self.on_thread(self.process.kill)

    async def close(self) -> None:
        """End the process: in good order where it is idle, at once where it is not."""
        leaving = asyncio.ensure_future(self.on_thread(self.process.leave))
        done, _ = await asyncio.wait([leaving], timeout=LEAVE_ALL_S)
        if not done:
            await asyncio.to_thread(self.process.stop)
            await leaving
        self._thread.shutdown(wait=False)


@dataclass(eq=False)
class Place:
    """One live episode: a place in a process."""

    number: int
    host: Host
    life: int = -1
    """The life of the process in which the episode began."""
    ticket: int = -1
    """Who holds it; -1: nobody."""
    under_way: int = 0
    """The number of its calls in progress."""


class Hosts:
    """All places of a worker. All methods belong to one event loop."""

    def __init__(self, config: EnvironmentConfig, make: Callable[[], EnvironmentProcess]) -> None:
        self._config = config
        self._make = make
        self._hosts: list[Host] = []
        self._idle: list[Place] = []
        self._held: dict[int, Place] = {}
        self._tickets = itertools.count()
        self._free = asyncio.Semaphore(config.num_envs)
        self._numbers = itertools.count()

    @property
    def num_held(self) -> int:
        """The number of live episodes."""
        return len(self._held)

    @property
    def processes(self) -> list[EnvironmentProcess]:
        return [host.process for host in self._hosts]

    async def acquire(self) -> int:
        """Take a place, when one is free; returns the ticket by which it is used."""
        await self._free.acquire()
        place = self._idle.pop() if self._idle else self._new_place()
        place.ticket = next(self._tickets)
        self._held[place.ticket] = place
        return place.ticket

    def _new_place(self) -> Place:
        number = next(self._numbers)
        if number % self._config.envs_per_process == 0:
            self._hosts.append(Host(self._make(), len(self._hosts)))
        return Place(number, self._hosts[-1])

    async def begin(self, ticket: int, environment: str, row: bytes, seed: int) -> dict[str, Any]:
        """Begin the episode of a place; see `Host.call`."""
        place = self._place(ticket)

        def begin() -> dict[str, Any]:
            if place.host.process.pid is None:
                _start(place.host.process)
            place.life = place.host.process.life
            request = Begin(place.number, environment, row, seed)
            return place.host.process.call(request, self._config.reset_timeout_s, "reset_timeout_s")

        return await self._counted(place, place.host.on_thread(begin))

    async def use(self, ticket: int, make: Callable[[int], Request]) -> dict[str, Any]:
        """Make a call of the episode's environment; `make` is given the number of its place."""
        place = self._place(ticket)
        limit_s = self._config.step_timeout_s
        call = place.host.call(make(place.number), limit_s, "step_timeout_s", place.life)
        return await self._counted(place, call)

    async def release(self, ticket: int) -> None:
        """Give a place back. One whose call is in progress is freed by the end of its process: nobody waits for the answer."""
        place = self._held.pop(ticket, None)
        if place is None:
            return
        place.ticket = -1
        if place.under_way and self._config.envs_per_process == 1:
            await place.host.end()
        self._idle.append(place)
        self._free.release()

    async def close(self) -> None:
        """End every process; held places are lost."""
        self._held.clear()
        await asyncio.gather(*(host.close() for host in self._hosts))

    def _place(self, ticket: int) -> Place:
        place = self._held.get(ticket)
        if place is None:
            raise EnvironmentFailedError(
                ScoreStatus.CRASHED,
                "the environment is gone: its sampler was silent for too long, or its worker closed",
            )
        return place

    async def _counted(self, place: Place, call: Any) -> dict[str, Any]:
        place.under_way += 1
        began = time.monotonic()
        try:
            answer: dict[str, Any] = await call
            return {**answer, "seconds": time.monotonic() - began}
        finally:
            place.under_way -= 1


def _start(process: EnvironmentProcess) -> None:
    """Start a process for an episode, whose failure it is if that fails: at the worker's start the classes could be imported."""
    try:
        process.start()
    except RewardError as e:
        raise EnvironmentFailedError(ScoreStatus.CRASHED, str(e)) from None
