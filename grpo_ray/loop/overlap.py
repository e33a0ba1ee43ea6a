"""Forward and backward of finished groups while the last ones of a step are still sampled: the gradient is a sum.

groups complete -> certain to be in the batch? -> enough to be worth a call? -> Learner.accumulate
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from grpo_ray.algorithm.train_batch import cut_batch, set_advantages
from grpo_ray.config.schema import RunConfig
from grpo_ray.loop.roles import Learner
from grpo_ray.types import Group

_OF_ONE_GROUP = ("grpo", "dr_grpo", "rloo", "process")
"""Advantages that no other group has a part in."""

LEAST_FILLED = 4
"""A part fills at least one in so many of the tokens of a micro-batch on each rank. It only begins when the learner has nothing
to do, and waiting for a full one costs more than a few small micro-batches: passes take as long as their tokens."""


def can_overlap(config: RunConfig) -> bool:
    """Is what a group adds to the gradient known when the group is complete, but for a factor common to all?"""
    a = config.algorithm
    one_step = a.num_mini_batches == 1 and a.num_iterations == 1
    # Sampling ahead with groups that drop out: which of the later ones this step gets is known only at its end.
    settled = not (a.dynamic_sampling and a.max_staleness > 0)
    known = a.advantage in _OF_ONE_GROUP and not a.advantages_on_learner
    return config.learner.overlap and not config.colocated and one_step and settled and known


class PartialBatches:
    """What the learner gets of a step before its batch is whole. One part is under way at a time."""

    def __init__(self, config: RunConfig, learner: Learner, when_done: Callable[[asyncio.Task[None]], None]) -> None:
        """`when_done` is called when a part is through."""
        self._config = config
        self._learner = learner
        self._when_done = when_done
        self._enough = config.learner.micro_batch_tokens * config.learner.data_parallel_size / LEAST_FILLED
        """Tokens of a part, at least."""
        self._active = can_overlap(config)
        self._count = 0
        self._lacking = 0.0
        """Tokens that have to come before there can be enough: till then nobody looks through the groups."""
        self._waiting: dict[int, int] = {}
        """Order of each group that was offered and is in no part yet -> its work, at most."""
        self.under_way: asyncio.Task[None] | None = None
        """Of the last part; it may be done."""

    @property
    def wants_more(self) -> bool:
        return self._active and self._lacking <= 0 and (self.under_way is None or self.under_way.done())

    def came(self, group: Group) -> None:
        """It is complete."""
        self._lacking -= _work(group)

    def look_again(self) -> None:
        """Groups that came before may be certain now."""
        self._lacking = 0.0

    def offer(self, certain: Sequence[Group], step: int) -> None:
        """Start on those of these groups that the learner has not had, if they are enough.

        Args:
            certain: complete, and in the batch of this step whatever becomes of the others.
            step: steps done; the policy version that trains them.
        """
        new = [g for g in certain if g.part is None]
        self._waiting |= {g.order: _work(g) for g in new if g.order not in self._waiting}
        self._lacking = self._enough - sum(self._waiting.values())
        if self._lacking <= 0 and (fresh := [g for g in new if not g.advantages]):
            # Of many at once: for each group as it comes they would cost more than all else that is done for it.
            set_advantages(fresh, self._config.algorithm)
            self._waiting = {g.order: _work(g) for g in new}
            self._lacking = self._enough - sum(self._waiting.values())
        if self._lacking > 0:
            return
        part = cut_batch(new, step, self._config)
        for group in new:
            group.part = self._count
        self._waiting = {}
        self._count += 1
        if self.under_way is not None:
            self.under_way.result()
        self.under_way = asyncio.create_task(self._learner.accumulate(part))
        self.under_way.add_done_callback(self._when_done)

    async def finish(self) -> None:
        """The part under way is done, and the step has no more. Raises what went wrong with it."""
        under_way, self.under_way = self.under_way, None
        self._count, self._lacking, self._waiting = 0, 0.0, {}
        if under_way is not None:
            await under_way

    async def cancel(self) -> None:
        """Wait for nothing any more."""
        if self.under_way is not None:
            self.under_way.cancel()
            await asyncio.gather(self.under_way, return_exceptions=True)


def _work(group: Group) -> int:
    """Tokens of its samples that move something; of all, as long as their advantages are not known."""
    advantages = group.advantages or [1.0] * len(group.samples)
    return sum(s.num_prompt_tokens + s.num_tokens for s, a in zip(group.samples, advantages, strict=True) if a != 0)
