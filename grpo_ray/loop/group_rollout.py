"""Future of a whole group, whose G samples are each scored as soon as they are finished.

    requests -> Sampler.generate -> Scorer.score -> group.samples, group.scores

It works by callbacks: a task for each sample would cost the controller as much as everything else that it does for the sample.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from grpo_ray.loop.immediate_future import ImmediateFuture
from grpo_ray.loop.roles import Sampler, Scorer
from grpo_ray.types import Group, SampleInfo, SampleRequest, Score, ScoreRequest, TrainerState

T = TypeVar("T")


class GroupRollout(asyncio.Future[None]):
    """Future that is done when the group is complete. The first failure is its failure and cancels the rest; cancelling it
    cancels all."""

    __slots__ = ("_drawn", "_per_call", "_scored", "_scorer", "_size", "_trainer", "_under_way", "group")

    def __init__(
        self,
        group: Group,
        requests: Sequence[SampleRequest],
        sampler: Sampler,
        scorer: Scorer,
        *,
        at_once: bool,
        trainer: TrainerState | None = None,
    ) -> None:
        """Start sampling. With `at_once` the samples of the group are scored in one call, when all are finished
        (`RewardConfig.whole_groups`).
        """
        super().__init__(loop=asyncio.get_running_loop())
        self.group = group
        self._scorer = scorer
        self._trainer = trainer
        self._size = len(requests)
        self._per_call = self._size if at_once else 1
        self._drawn: list[SampleInfo] = []
        """Finished samples that have not been sent to the scorer yet."""
        self._scored: dict[int, tuple[SampleInfo, Score]] = {}
        """Scored samples by their index."""
        self._under_way: dict[asyncio.Future[Any], Callable[[Any], None]] = {}
        """The futures in flight, each with the callback that takes its result."""
        then = self._take_sample
        for request in requests:
            self._begin(sampler.generate(request), then)

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        self._end_rest()
        return cancelled

    def _begin(self, work: Awaitable[T], then: Callable[[T], None]) -> None:
        future = asyncio.ensure_future(work)
        self._under_way[future] = then
        if isinstance(future, ImmediateFuture):
            future.when_done(self._go_on)
        else:
            future.add_done_callback(self._go_on)

    def _go_on(self, future: asyncio.Future[Any]) -> None:
        if self.done():
            # Retrieve the exception, which asyncio would log otherwise.
            _ = future.cancelled() or future.exception()
            return
        try:
            self._under_way.pop(future)(future.result())
        except asyncio.CancelledError:
            self.cancel()
        except Exception as e:
            self.set_exception(e)
            self._end_rest()

    def _take_sample(self, info: SampleInfo) -> None:
        self._drawn.append(info)
        if len(self._drawn) == self._per_call:
            infos, self._drawn = self._drawn, []
            if self._per_call > 1:
                infos.sort(key=_index)
            prompt, version = self.group.prompt, self.group.dispatched_version
            requests = [ScoreRequest.of(i, prompt, version, self._trainer) for i in infos]
            self._begin(self._scorer.score(requests), partial(self._take_scores, infos))

    def _take_scores(self, infos: Sequence[SampleInfo], scores: Sequence[Score]) -> None:
        for info, score in zip(infos, scores, strict=True):
            self._scored[info.index] = (info, score)
        if len(self._scored) == self._size:
            pairs = [self._scored[i] for i in range(self._size)]
            self.group.samples = [info for info, _ in pairs]
            self.group.scores = [score for _, score in pairs]
            self.set_result(None)

    def _end_rest(self) -> None:
        under_way, self._under_way = self._under_way, {}
        for future in under_way:
            future.cancel()


def _index(info: SampleInfo) -> int:
    return info.index
