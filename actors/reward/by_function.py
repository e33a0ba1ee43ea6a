"""Several pools of reward workers as one scorer: functions with workers of their own (a model, on a GPU), and all the others.

requests -> each pool its functions -> parts, in the recipe's order -> Score
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from actors.reward.pool import RewardPool
from grpo_ray.config.reward import SHARED_POOL, RewardConfig
from grpo_ray.rewards.functions.scoring import weighted_sum
from grpo_ray.types import Score, ScoreRequest, Track


class RewardPools:
    """Implements `grpo_ray.loop.roles.Scorer`."""

    def __init__(self, config: RewardConfig, pools: Sequence[RewardPool]) -> None:
        self._titles = [f.title for f in config.functions]
        self._weights = [f.weight for f in config.functions]
        self._pools = pools
        self._shared = next((p for p in pools if p.name == SHARED_POOL), None)
        """The pool of the functions without workers of their own."""

    def scale(self, number: int) -> None:
        """Scale the shared pool; functions with workers of their own keep the recipe's number."""
        if self._shared is not None:
            self._shared.scale(number)

    def take_most_waiting(self) -> int:
        """As `RewardPool.take_most_waiting`, for the shared pool."""
        return self._shared.take_most_waiting() if self._shared is not None else 0

    def score(self, requests: Sequence[ScoreRequest]) -> asyncio.Future[list[Score]]:
        return asyncio.ensure_future(self._score(requests))

    async def _score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        of_pools = await asyncio.gather(*(pool.score(requests) for pool in self._pools))
        return [
            self._joined(scores, r.sample.num_tokens)
            for r, scores in zip(requests, zip(*of_pools, strict=True), strict=True)
        ]

    def _joined(self, scores: Sequence[Score], num_tokens: int) -> Score:
        lost = next((s for s in scores if not s.parts), None)
        if lost is not None:
            return lost
        by_title = {part.name: part for score in scores for part in score.parts}
        if any(title not in by_title for title in self._titles):
            # The environment of the sample's episode failed, and no function was called.
            return scores[0]
        own = [part for title, part in by_title.items() if title not in self._titles]
        parts = [*(by_title[title] for title in self._titles), *own]
        return weighted_sum(parts, [*self._weights, *(1.0 for _ in own)], num_tokens)

    def take_tracks(self) -> list[Track]:
        return [track for pool in self._pools for track in pool.take_tracks()]
