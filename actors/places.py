"""Places for workers of a kind, reserved together: packed onto as few nodes as hold them, neighbours side by side.

Learner ranks next to each other share sequences and rings of gradients, which ought to stay within a node: there is NVLink
between its GPUs. An engine and a learner rank that share a GPU meet in one place by their index.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.reward import RewardConfig
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DeadlineError

POLL_S = 0.05
WorkerConfig = RolloutConfig | RewardConfig | LearnerConfig


@dataclass(frozen=True)
class Places:
    group: Any
    """Ray's placement group."""
    order: tuple[int, ...]
    """The index of the bundle of each place; those of a node are side by side."""

    @classmethod
    async def reserve(
        cls, bundle: Mapping[str, float], count: int, labels: Mapping[str, str], limit_s: float, whose: str
    ) -> Places:
        """Reserve places of this size, each on a node with these labels.

        Args:
            whose: e.g. `learners`.

        Raises:
            DeadlineError: the cluster has no room for them within `limit_s`.
        """
        import ray

        group = ray.util.placement_group([dict(bundle)] * count, "PACK", bundle_label_selector=[dict(labels)] * count)
        try:
            nodes = await _nodes(group, limit_s)
            if nodes is None:
                where = f" on nodes with the labels {dict(labels)}" if labels else ""
                raise DeadlineError(
                    f"the cluster had no room for the {whose} within {limit_s:g} s, {count} x {dict(bundle)}{where}; see what "
                    "holds it (ray status), or raise deadlines.start_s"
                )
        except BaseException:
            ray.util.remove_placement_group(group)
            raise
        return cls(group, side_by_side(nodes))

    def options(self, index: int) -> dict[str, Any]:
        """The options, in Ray's words, of the actor in this place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Strategy

        return {"scheduling_strategy": Strategy(self.group, placement_group_bundle_index=self.order[index])}

    def remove(self) -> None:
        """Give the places back; what runs there is ended."""
        import ray

        ray.util.remove_placement_group(self.group)


async def _nodes(group: Any, limit_s: float) -> dict[int, str] | None:
    """The node of each bundle of a group, once all have one; None: not within `limit_s`."""
    import ray

    give_up = time.monotonic() + limit_s
    while (table := ray.util.placement_group_table(group))["state"] != "CREATED":
        if time.monotonic() >= give_up:
            return None
        await asyncio.sleep(POLL_S)
    nodes: dict[int, str] = table["bundles_to_node_id"]
    return nodes


def side_by_side(nodes: Mapping[int, str]) -> tuple[int, ...]:
    """The bundles in such an order that those of a node follow each other; the nodes in the order of their first bundles."""
    first: dict[str, int] = {}
    for index in sorted(nodes):
        first.setdefault(nodes[index], index)
    return tuple(sorted(nodes, key=lambda index: (first[nodes[index]], index)))


async def reserve_pairs(config: RunConfig) -> Places:
    """A GPU for each engine and its learner rank. Raises DeadlineError."""
    rollout, learner = config.rollout, config.learner
    bundle: dict[str, float] = {"GPU": 1.0}
    for kind in (rollout, learner):
        for name, amount in _asked(kind, 0).items():
            bundle[name] = bundle.get(name, 0) + amount
    return await Places.reserve(
        bundle, rollout.num_actors, rollout.labels, config.deadlines.start_s, "engines and learners"
    )


async def reserve_ranks(learner: LearnerConfig, num_gpus: float, limit_s: float) -> Places | None:
    """A place for each learner rank; None: one alone, or ranks that ask for nothing, may be anywhere. Raises DeadlineError."""
    bundle = _asked(learner, num_gpus)
    if learner.num_actors == 1 or not bundle:
        return None
    return await Places.reserve(bundle, learner.num_actors, learner.labels, limit_s, "learners")


def _asked(kind: RolloutConfig | LearnerConfig, num_gpus: float) -> dict[str, float]:
    return {name: n for name, n in {"CPU": kind.num_cpus, "GPU": num_gpus, **kind.resources}.items() if n}


def placed(kind: WorkerConfig, places: Places | None = None, index: int = 0) -> dict[str, Any]:
    """The placement options of an actor of this kind: the place of this index; without places, any node that has what it asks
    for."""
    resources = {"resources": dict(kind.resources)} if kind.resources else {}
    if places is not None:
        return resources | places.options(index)
    return resources | ({"label_selector": dict(kind.labels)} if kind.labels else {})
