"""Environments as a sampler uses them: a place at the least loaded worker, calls by its handle, and what they answer.

use(members) -> acquire -> EnvironmentSession: begin, step or call .., end -> release
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from actors.environment.actor import SILENT_S
from actors.environment.pool import Members
from actors.reward.answers import decode
from actors.reward.pipe import EndedError
from grpo_ray.episodes.calls import ToolCall
from grpo_ray.episodes.contract import Stepped, readable
from grpo_ray.episodes.described import Described
from grpo_ray.episodes.episode import Content, EnvironmentFailedError
from grpo_ray.types import RewardScore, ScoreStatus


@dataclass(frozen=True)
class Ended:
    """The rewards at the end of an episode."""

    reward: float | None
    """The environment's own."""
    scores: tuple[RewardScore, ...]
    """Those of reward functions that name `environments`."""


class EnvironmentSession:
    """One live environment at a worker; implements `episode.Session`."""

    def __init__(self, worker: str, handle: Any, ticket: int) -> None:
        self.worker = worker
        self.handle = handle
        self.ticket = ticket

    async def begin(self, environment: str, row: bytes, seed: int) -> Any:
        """Begin the episode; returns what `reset` did."""
        return (await self._ask(self.handle.begin.remote(self.ticket, environment, row, seed))).get("observation")

    async def step(self, action: str) -> Stepped:
        told = await self._ask(self.handle.step.remote(self.ticket, action))
        messages, reward = told.get("messages"), told.get("reward")
        if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
            raise EnvironmentFailedError(ScoreStatus.ERROR, f"a step's observations are no messages: {messages!r:.80}")
        return Stepped(messages, None if reward is None else float(reward), bool(told.get("done")))

    async def call(self, call: ToolCall) -> tuple[Content, bool]:
        told = await self._ask(self.handle.call.remote(self.ticket, call))
        content = told.get("content")
        return content if isinstance(content, list) else str(content), bool(told.get("error"))

    async def end(self, inputs: bytes, num_tokens: int) -> Ended:
        """The rewards of the episode, whose completion has so many tokens."""
        told = await self._ask(self.handle.end.remote(self.ticket, inputs))
        reward = told.get("reward")
        try:
            scores = [
                decode(str(name), [num_tokens], {"scores": [encoded]})[0] for name, *encoded in told.get("scores", [])
            ]
            if reward is not None and not math.isfinite(float(reward)):
                raise EndedError
        except (EndedError, TypeError, ValueError):
            raise EnvironmentFailedError(
                ScoreStatus.CRASHED, "the process of the environment wrote something that is no answer"
            ) from None
        return Ended(None if reward is None else float(reward), tuple(scores))

    async def _ask(self, answer: Any) -> dict[str, Any]:
        try:
            told: dict[str, Any] = await answer
        except RayError as e:
            raise EnvironmentFailedError(
                ScoreStatus.CRASHED, f"{self.worker} died with the environment ({type(e).__name__})"
            ) from None
        if "failed" in told:
            status, detail = told["failed"]
            raise EnvironmentFailedError(ScoreStatus(status), str(detail))
        try:
            return {name: readable(value) for name, value in told.items()}
        except RecursionError:
            raise EnvironmentFailedError(
                ScoreStatus.ERROR,
                "what the environment said is lists and objects inside each other, too deep to be read",
            ) from None


class EnvironmentClient:
    """The environments of one sampler. All methods belong to one event loop."""

    def __init__(self, sampler: str) -> None:
        self._name = f"{sampler}/{uuid.uuid4().hex}"
        self._members = Members((), {})
        self._lost: set[str] = set()
        """Workers that died since the last news of them."""
        self._held: Counter[str] = Counter()
        self._changed = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def use(self, members: Members) -> None:
        """Use these workers from now on."""
        self._members, self._lost = members, set()
        self._changed.set()
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_signs_of_life())

    def described(self, environment: str) -> Described | None:
        """What the environment of this name is; None: there is none of that name."""
        found = self._members.described.get(environment)
        if found is None:
            return None
        return Described(found["title"], found["interface"], tuple(found["schemas"]), found["rewards"])

    async def acquire(self) -> EnvironmentSession:
        """A place at the worker where this sampler holds the fewest; waits until one is free.

        Raises:
            EnvironmentFailedError: there is no worker any more.
        """
        while True:
            name, handle = await self._least_loaded()
            self._held[name] += 1
            asked = asyncio.ensure_future(_wrapped(handle.acquire.remote(self._name)))
            try:
                return EnvironmentSession(name, handle, await asyncio.shield(asked))
            except RayError:
                self._held[name] -= 1
                self._lost.add(name)
            except asyncio.CancelledError:
                self._held[name] -= 1
                self._keep(_give_back(asked, handle))
                raise

    def release(self, session: EnvironmentSession) -> None:
        """Give the place back, whatever goes on there."""
        self._held[session.worker] -= 1
        session.handle.release.remote(session.ticket)

    async def _least_loaded(self) -> tuple[str, Any]:
        while True:
            if self._members.broken:
                raise EnvironmentFailedError(
                    ScoreStatus.CRASHED, f"no environment worker is left: {self._members.broken}"
                )
            serving = [(name, handle) for name, handle in self._members.handles if name not in self._lost]
            if serving:
                return min(serving, key=lambda member: self._held[member[0]])
            self._changed.clear()
            await self._changed.wait()

    async def _tell_signs_of_life(self) -> None:
        while True:
            await asyncio.sleep(SILENT_S / 4)
            for name, handle in self._members.handles:
                if self._held[name]:
                    handle.hold.remote(self._name)

    def _keep(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _wrapped(answer: Any) -> int:
    return int(await answer)


async def _give_back(asked: asyncio.Future[int], handle: Any) -> None:
    """Release the place that was asked for, when it comes: nobody wants it any more."""
    with contextlib.suppress(RayError):
        handle.release.remote(await asked)
