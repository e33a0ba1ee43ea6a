"""Overlap of forward and backward passes on finished groups with the sampling of a step's last ones: the gradient is a sum.

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
"""Advantages that depend on their own group alone."""

LEAST_FILLED = 4
"""The divisor that sets the least size of a partial batch: it fills at least 1 / LEAST_FILLED of the tokens of a micro-batch on
each rank. It only starts when the learner is idle, and waiting for a full one costs more than a few small micro-batches: passes
take as long as their tokens.
"""


def can_overlap(config: RunConfig) -> bool:
    """Whether a group's contribution to the gradient is known when the group is complete, up to a factor common to all groups."""
    a = config.algorithm
    one_step = a.num_mini_batches == 1 and a.num_iterations == 1
    # When sampling ahead with groups that drop out, which of the later ones this step gets is known only at its end.
    settled = not (a.dynamic_sampling and a.max_staleness > 0)
    known = a.advantage in _OF_ONE_GROUP and not a.advantages_on_learner
    return config.learner.overlap and not config.colocated and one_step and settled and known


class PartialBatches:
    """Partial batches that the learner gets of a step before its batch is complete, one at a time."""

    def __init__(self, config: RunConfig, learner: Learner, when_done: Callable[[asyncio.Task[None]], None]) -> None:
        """Create the queue of partial batches; `when_done` is called whenever the learner has finished one."""
        self._config = config
        self._learner = learner
        self._when_done = when_done
        self._enough = config.learner.micro_batch_tokens * config.learner.data_parallel_size / LEAST_FILLED
        """The least number of tokens of a partial batch."""
        self._active = can_overlap(config)
        self._count = 0
        self._lacking = 0.0
        """The number of tokens that have to arrive before there can be enough; until then nobody scans the groups."""
        self._waiting: dict[int, int] = {}
        """The order of each group that was offered and is in no partial batch yet -> an upper bound of its work."""
        self.under_way: asyncio.Task[None] | None = None
        """The task of the last partial batch, which may be done."""

    @property
    def wants_more(self) -> bool:
        return self._active and self._lacking <= 0 and (self.under_way is None or self.under_way.done())

    def came(self, group: Group) -> None:
        """Note that a group is complete."""
        self._lacking -= _work(group)

    def look_again(self) -> None:
        """Scan the groups again at the next offer, since earlier ones may be certain now."""
        self._lacking = 0.0

    def offer(self, certain: Sequence[Group], step: int) -> None:
        """Start on those of these groups that the learner has not had, if they are enough.

        Args:
            certain: complete groups that are in the batch of this step whatever happens to the others.
            step: the number of the step that trains them.
        """
        new = [g for g in certain if g.part is None]
        self._waiting |= {g.order: _work(g) for g in new if g.order not in self._waiting}
        self._lacking = self._enough - sum(self._waiting.values())
        if self._lacking <= 0 and (fresh := [g for g in new if not g.advantages]):
            # One scan for many groups: a scan for each group as it comes would cost more than everything else that is done for it.
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
        """Wait for the partial batch in progress and start no more in this step. Raises its exception."""
        under_way, self.under_way = self.under_way, None
        self._count, self._lacking, self._waiting = 0, 0.0, {}
        if under_way is not None:
            await under_way

    async def cancel(self) -> None:
        """Cancel the partial batch in progress."""
        if self.under_way is not None:
            self.under_way.cancel()
            await asyncio.gather(self.under_way, return_exceptions=True)


def _work(group: Group) -> int:
    """The number of tokens of the group's samples with a gradient; of all its samples as long as advantages are not known."""
    advantages = group.advantages or [1.0] * len(group.samples)
    return sum(s.num_prompt_tokens + s.num_tokens for s, a in zip(group.samples, advantages, strict=True) if a != 0)
