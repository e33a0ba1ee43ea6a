"""Groups beyond a checkpoint's step that it restores: finished groups are not sampled again.

complete, not trained   kept completely; dispatched again in its place, it is finished at once
dropped                 its row of the ledger is kept; its place is skipped
in flight               sampled again, by the policy of the checkpoint's step
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
    """The restored groups by dispatch order; a fresh run has none."""

    groups: dict[int, KeptGroup] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)

    @classmethod
    def of(
        cls, kept: Sequence[KeptGroup], dropped: Sequence[LedgerRow], first: int, step: int, config: RunConfig
    ) -> tuple[RestoredGroups, int]:
        """The groups that can still be used, and the number of those that cannot.

        A group keeps its place, and so is trained at the step at which it would have been; that is too late only if `max_staleness`
        has been lowered since.

        Args:
            kept: the checkpoint's finished groups in dispatch order.
            dropped: the ledger's rows of dropped groups.
            first: the order at which dispatch starts again.
            step: the step of the checkpoint.
            config: the config of the resumed run.
        """
        gone = {row.dispatch_order for row in dropped}
        size, bound = config.prompts_per_step, config.algorithm.max_staleness
        fitting = {}
        for group in kept:
            place = group.order - first - sum(first <= order < group.order for order in gone)
            trained_by = step + place // size
            oldest = min([v for v in group.min_versions if v is not None], default=group.dispatched_version)
            if oldest >= trained_by - bound:
                fitting[group.order] = group
        return cls(fitting, gone), len(kept) - len(fitting)

    def take(self, group: Group) -> KeptGroup | None:
        """Take the finished group in the place of a fresh one. A place holds the same prompt as before; otherwise the data differ,
        which the cursor has refused.
        """
        kept = self.groups.pop(group.order, None)
        assert kept is None or kept.prompt_id == group.prompt.id, f"{kept} is not {group.prompt.id}"
        return kept


def how_sampled(config: RunConfig, params: SamplingParams) -> dict[str, Any]:
    """The settings that a kept group has to share with one that is sampled now, to be of use."""
    rewards = config.reward.model_dump(mode="json", include={"functions", "unit"})
    how = {"params": asdict(params), "num_generations": config.rollout.num_generations, "reward": rewards}
    same_as_read: dict[str, Any] = json.loads(json.dumps(how))
    return same_as_read
