"""What a checkpoint brings along of the groups beyond its step: nothing that was finished is sampled again.

complete, not trained   kept whole; dispatched again in its place, it is finished at once
dropped                 its row of the ledger; its place is passed over
under way               sampled again, by the policy of the checkpoint's step
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.run.kept_groups import KeptGroup
from grpo_ray.run.ledger import LedgerRow
from grpo_ray.types import Group, SamplingParams


@dataclass
class RestoredGroups:
    """By dispatch order; a fresh run has none."""

    groups: dict[int, KeptGroup] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, kept: Sequence[KeptGroup], dropped: Sequence[LedgerRow], first: int, step: int, config: RunConfig
    ) -> tuple[RestoredGroups, int]:
        """Those that still fit, and how many do not.

        A group keeps its place, and so is trained at the step at which it would have been; which is too late for it only if
        `max_staleness` has been lowered since.

        Args:
            kept: in dispatch order.
            dropped: rows of the ledger.
            first: the order at which dispatch begins again.
            step: of the checkpoint.
            config: of the resumed run.
        """
        gone = {row.dispatch_order for row in dropped}
        size, bound = config.prompts_per_step, config.algorithm.max_staleness
        fitting = {}
        for group in kept:
            place = group.order - first - sum(first <= order < group.order for order in gone)
            trained_by = step + place // size
            if min(group.min_versions) >= trained_by - bound:
                fitting[group.order] = group
        return cls(fitting, gone), len(kept) - len(fitting)

    def take(self, group: Group) -> KeptGroup | None:
        """The finished group in the place of a fresh one. A place holds the prompt that it held, or the data are others, which
        the cursor has refused."""
        kept = self.groups.pop(group.order, None)
        assert kept is None or kept.prompt_id == group.prompt.id, f"{kept} is not {group.prompt.id}"
        return kept


def how_sampled(config: RunConfig, params: SamplingParams) -> dict[str, Any]:
    """What a kept group has in common with one that is sampled now, or it is of no use."""
    rewards = config.reward.model_dump(mode="json", include={"functions", "unit"})
    how = {"params": asdict(params), "num_generations": config.rollout.num_generations, "reward": rewards}
    same_as_read: dict[str, Any] = json.loads(json.dumps(how))
    return same_as_read
