"""Answers that are taken the moment they are there, beside those that are awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from grpo_ray.loop.immediate_future import ImmediateFuture

ENDS: dict[str, Callable[[ImmediateFuture[int]], Any]] = {
    "result": lambda answer: answer.set_result(7),
    "error": lambda answer: answer.set_exception(ValueError("7")),
    "cancelled": lambda answer: answer.cancel(),
}


def outcome(future: asyncio.Future[int]) -> str:
    if future.cancelled():
        return "cancelled"
    return "error" if future.exception() else f"result {future.result()}"


@pytest.mark.parametrize("end", ENDS)
def test_the_taker_is_called_once_inside_the_call_that_ends_it(end: str) -> None:
    async def work() -> None:
        answer, told = ImmediateFuture[int](), list[str]()
        answer.when_done(lambda future: told.append(outcome(future)))
        assert told == []
        ENDS[end](answer)
        assert told == ["result 7" if end == "result" else end]
        answer.cancel()
        await asyncio.sleep(0)
        assert len(told) == 1

    asyncio.run(work())


def test_what_is_done_already_is_taken_in_the_next_turn() -> None:
    async def work() -> None:
        answer, told = ImmediateFuture[int](), list[str]()
        answer.set_result(7)
        answer.when_done(lambda future: told.append(outcome(future)))
        assert told == []
        await asyncio.sleep(0)
        assert told == ["result 7"]

    asyncio.run(work())


def test_it_can_be_awaited_beside_its_taker() -> None:
    async def work() -> None:
        answer, told = ImmediateFuture[int](), list[str]()
        answer.when_done(lambda future: told.append(outcome(future)))
        asyncio.get_running_loop().call_soon(answer.set_result, 7)
        assert (await answer, told) == (7, ["result 7"])

    asyncio.run(work())
