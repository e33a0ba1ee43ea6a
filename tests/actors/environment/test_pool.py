"""The pool of environment workers, and a sampler's client of it, over workers in this process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from actors.environment import pool as pools
from actors.environment.client import EnvironmentClient
from actors.environment.pool import EnvironmentPool, Members
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.episodes.episode import EnvironmentFailedError
from grpo_ray.errors import RewardError

DESCRIBED = {"": {"title": "Game", "interface": "gym", "schemas": [], "rewards": True}}
CONFIG = {"name": "my_game.Game", "num_actors": 2}


class Worker:
    """A worker whose places are numbers; it dies when it is told to."""

    def __init__(self, *args: Any) -> None:
        self.name = args[3]
        self.dead = False
        self.tickets = itertools.count()
        self.held: set[int] = set()

    async def start(self) -> dict[str, Any]:
        return {"pid": 1, "described": DESCRIBED}

    async def ping(self) -> None:
        return None

    async def stop(self) -> None:
        self.held.clear()

    async def acquire(self, sampler: str) -> int:
        await asyncio.sleep(0.01)
        ticket = next(self.tickets)
        self.held.add(ticket)
        return ticket

    async def release(self, ticket: int) -> None:
        self.held.discard(ticket)


class Handle:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            if self.worker.dead:
                raise ActorDiedError
            return await getattr(self.worker, name)(*args)

        class Method:
            @staticmethod
            def remote(*args: Any) -> asyncio.Task[Any]:
                return asyncio.ensure_future(call(*args))

        return Method


class Source:
    """Starts workers here."""

    def __init__(self, make: Callable[..., Worker] = Worker) -> None:
        self.make = make
        self.handles: list[Handle] = []

    def start(self, actor: type, *args: Any, **options: Any) -> Handle:
        self.handles.append(Handle(self.make(*args)))
        return self.handles[-1]

    def kill(self, handle: Handle) -> None:
        handle.worker.dead = True


def with_pool(tmp_path: Path, use: Callable[[EnvironmentPool, Source], Awaitable[None]], make: Any = Worker) -> Source:
    async def whole() -> Source:
        source = Source(make)
        config = EnvironmentConfig.model_validate(CONFIG)
        pool = await EnvironmentPool.create(config, (), str(tmp_path), start_timeout_s=30, actors=source)
        try:
            await use(pool, source)
        finally:
            await pool.close()
        return source

    source = asyncio.run(whole())
    assert all(handle.worker.dead for handle in source.handles)
    return source


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_worker_that_dies_is_left_out_at_once_and_comes_back_as_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PING_S", 0.02)

    async def use(pool: EnvironmentPool, source: Source) -> None:
        told: list[Members] = []
        pool.on_change = told.append
        before = [name for name, _ in pool.members.handles]
        source.handles[0].worker.dead = True
        await until(lambda: len(told) >= 2)
        assert [name for name, _ in told[0].handles] == before[1:]
        again = [name for name, _ in told[1].handles]
        assert len(again) == 2
        assert before[0] not in again
        assert pool.live() == {"alive/environment": 2.0, "restarts/environment": 1.0}

    with_pool(tmp_path, use)


def test_the_pool_scales_both_ways(tmp_path: Path) -> None:
    async def use(pool: EnvironmentPool, source: Source) -> None:
        told: list[Members] = []
        pool.on_change = told.append
        pool.scale(3)
        await until(lambda: len(pool.members.handles) == 3)
        pool.scale(1)
        assert [name.partition("/")[0] for name, _ in pool.members.handles] == ["environment-0"]
        await until(lambda: sum(not handle.worker.dead for handle in source.handles) == 1)
        assert len(told[-1].handles) == 1

    with_pool(tmp_path, use)


def test_a_class_that_can_not_be_used_ends_the_start_with_its_own_words(tmp_path: Path) -> None:
    class Refuses(Worker):
        async def start(self) -> dict[str, Any]:
            raise RewardError("environment 'my_game.Game': no such module")

    async def use(pool: EnvironmentPool, source: Source) -> None:
        raise AssertionError

    with pytest.raises(RewardError, match="no such module"):
        with_pool(tmp_path, use, Refuses)


def test_a_sampler_takes_the_worker_where_it_holds_fewest_and_gives_back_what_it_waits_for(tmp_path: Path) -> None:
    async def use(pool: EnvironmentPool, source: Source) -> None:
        client = EnvironmentClient("rollout-0")
        client.use(pool.members)
        sessions = [await client.acquire() for _ in range(4)]
        assert [len(handle.worker.held) for handle in source.handles] == [2, 2]
        waiting = asyncio.create_task(client.acquire())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await until(lambda: [len(handle.worker.held) for handle in source.handles] == [2, 2])
        for session in sessions:
            client.release(session)
        await until(lambda: not any(handle.worker.held for handle in source.handles))

    with_pool(tmp_path, use)


def test_a_sampler_goes_to_another_worker_when_one_is_dead_and_waits_when_all_are(tmp_path: Path) -> None:
    async def use(pool: EnvironmentPool, source: Source) -> None:
        client, members = EnvironmentClient("rollout-0"), pool.members
        client.use(members)
        source.handles[0].worker.dead = True
        names = {(await client.acquire()).worker for _ in range(2)}
        assert names == {members.handles[1][0]}
        source.handles[1].worker.dead = True
        waiting = asyncio.create_task(client.acquire())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        source.handles[1].worker.dead = False
        client.use(members)
        assert (await waiting).worker == members.handles[1][0]
        client.use(Members((), {}, "given up"))
        with pytest.raises(EnvironmentFailedError, match="no environment worker is left: given up"):
            await client.acquire()

    with_pool(tmp_path, use)
