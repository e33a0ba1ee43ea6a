"""What a restarted engine is given between two syncs: the weights of the version it is told, or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from actors.weights.protocol import EngineTarget, SendReport
from actors.weights.sync import RayWeightSync


class Done:
    """A reference to the result of a call that is over, as Ray has it."""

    def future(self) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


class Handle:
    """Of a rollout actor that does what it is asked, and remembers it."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*_: Any) -> Done:
                self._calls.append(method)
                return Done()

        return Method


class Pool:
    version = 3
    num_unfinished = 1
    on_stale: Any = None

    def __init__(self, calls: list[str], stages_weights: bool) -> None:
        self.stages_weights = stages_weights
        self.asleep = False
        self.target = EngineTarget("rollout-1", 2, Handle(calls), 1)
        self.synced: list[int] = []
        self.membership = asyncio.Lock()

    def engines(self, *, stale_only: bool = False) -> list[EngineTarget]:
        return [self.target]

    def mark_paused(self, targets: Sequence[EngineTarget], *, paused: bool) -> None:
        pass

    def mark_synced(self, targets: Sequence[EngineTarget], version: int) -> None:
        self.synced.append(version)


class Learner:
    def __init__(self, calls: list[str], unsent: bool, updated_while_connecting: bool) -> None:
        self.calls = calls
        self.unsent = unsent
        self.updated_while_connecting = updated_while_connecting

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        self.unsent |= self.updated_while_connecting

    async def send_weights(self, version: int) -> SendReport:
        self.calls.append(f"send {version}")
        return {"seconds": 0.0, "bytes": 1, "checksum": "0"}


@pytest.mark.parametrize(
    ("staged", "unsent", "updated_while_connecting", "calls", "synced"),
    [
        (False, False, False, ["probe", "pause", "send 3", "resume"], [3]),
        (False, True, False, [], []),
        (False, False, True, ["probe", "pause", "resume"], []),
        (True, False, False, ["probe", "send 3", "pause", "load_staged", "resume"], [3]),
        (True, False, True, ["probe"], []),
    ],
)
def test_an_updated_learner_sends_nothing_under_the_old_version(
    staged: bool, unsent: bool, updated_while_connecting: bool, calls: list[str], synced: list[int]
) -> None:
    seen: list[str] = []
    pool: Any = Pool(seen, staged)
    RayWeightSync(pool, Learner(seen, unsent, updated_while_connecting), timeout_s=5)
    asyncio.run(asyncio.wait_for(pool.on_stale(), 10))
    assert seen == calls
    assert pool.synced == synced


def test_engines_that_sleep_are_neither_paused_nor_resumed() -> None:
    """They are paused, and a resumed one would sample without a KV cache."""
    seen: list[str] = []
    pool: Any = Pool(seen, stages_weights=False)
    pool.asleep = True
    RayWeightSync(pool, Learner(seen, unsent=False, updated_while_connecting=False), timeout_s=5)
    asyncio.run(asyncio.wait_for(pool.on_stale(), 10))
    assert (seen, pool.synced) == (["probe", "send 3"], [3])


@pytest.mark.parametrize(("staged", "keep"), [(True, True), (False, True), (True, False), (False, False)])
def test_a_kv_cache_is_kept_over_an_update_where_that_is_asked_for(staged: bool, keep: bool) -> None:
    seen: list[str] = []
    pool: Any = Pool(seen, staged)
    asked: list[tuple[Any, ...]] = []

    def pause(*args: Any) -> Any:
        asked.append(args)
        return Done()

    pool.target.handle.pause = type("Pause", (), {"remote": staticmethod(pause)})
    RayWeightSync(pool, Learner(seen, unsent=False, updated_while_connecting=False), 5, keep_kv_cache=keep)
    asyncio.run(asyncio.wait_for(pool.on_stale(), 10))
    assert asked == [("keep", not keep)]
