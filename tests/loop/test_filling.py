"""A group that is filled by a sampler which finishes in an order of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from grpo_ray.loop.group_rollout import GroupRollout
from grpo_ray.types import (
    Group,
    Prompt,
    RewardScore,
    SampleInfo,
    SampleRequest,
    SamplingParams,
    Score,
    ScoreRequest,
    ScoreStatus,
    Track,
)

FINISHED = (3, 0, 4, 1, 2)
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_tokens=8, stop=(), stop_token_ids=())


class World:
    """Sampler and scorer; the reward of a sample is its index."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self._events = [asyncio.Event() for _ in FINISHED]

    async def generate(self, request: SampleRequest) -> SampleInfo:
        place = FINISHED.index(request.index)
        if place:
            await self._events[place - 1].wait()
        self._events[place].set()
        return SampleInfo(request.prompt_id, request.index, 2, 3, 0, "stop", "w-0", ref=[], row=request.index)

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        self.calls.append([r.sample.index for r in requests])
        values = [float(r.sample.index) for r in requests]
        return [Score(ScoreStatus.OK, v, (RewardScore("r", ScoreStatus.OK, v),)) for v in values]

    def take_stats(self) -> dict[str, float]:
        return {}

    def take_tracks(self) -> list[Track]:
        return []


@pytest.mark.parametrize("at_once", [True, False])
def test_a_function_of_whole_groups_is_given_them_in_the_order_of_their_samples(at_once: bool) -> None:
    """A function that compares neighbours, or a recorded call, is the same however the samples overtake each other."""
    group = Group(Prompt("p", [1, 2], "", None, {}), 0, 0)
    requests = [SampleRequest("p", i, [1, 2], i, PARAMS) for i in range(len(FINISHED))]

    async def fill() -> list[list[int]]:
        world = World()
        await asyncio.wait_for(GroupRollout(group, requests, world, world, at_once=at_once), 10)
        return world.calls

    calls = asyncio.run(fill())
    assert calls == ([list(range(5))] if at_once else [[i] for i in FINISHED])
    assert [info.index for info in group.samples] == list(range(5))
    assert [score.value for score in group.scores] == list(range(5))
