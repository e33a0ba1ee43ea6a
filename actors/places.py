"""Places for workers of a kind, reserved together: packed onto as few nodes as hold them, neighbours side by side.

Learner ranks next to each other share sequences and rings of gradients, which ought to stay within a node: there is NVLink
between its GPUs. Where engines and learner ranks take turns, a place is a GPU: rank r is in place r, and an engine of k GPUs has k
places after each other, all on one node.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.reward import RewardConfig
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import DeadlineError

POLL_S = 0.05
WorkerConfig = RolloutConfig | RewardConfig | EnvironmentConfig | LearnerConfig


@dataclass(frozen=True)
class Place:
    group: Any
    """Ray's placement group."""
    bundle: int
    """The index in the group."""

    def options(self) -> dict[str, Any]:
        """The options, in Ray's words, of what runs in this place."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as Strategy

        return {"scheduling_strategy": Strategy(self.group, placement_group_bundle_index=self.bundle)}


@dataclass(frozen=True)
class Places:
    places: tuple[Place, ...]
    """All of them; those of a node are side by side."""

    @classmethod
    async def reserve(
        cls,
        bundles: Sequence[Mapping[str, float]],
        count: int,
        labels: Mapping[str, str],
        limit_s: float,
        whose: str,
    ) -> Places:
        """Reserve places on nodes with these labels.

        Args:
            bundles: what each place of a set takes; a set is on one node.
            count: the number of sets.
            whose: e.g. `learners`.

        Raises:
            DeadlineError: the cluster has no room for them within `limit_s`.
        """
        groups = _ask_for(bundles, count, labels)
        give_up = time.monotonic() + limit_s
        try:
            nodes = [await _nodes(group, give_up) for group in groups]
            if None in nodes:
                raise DeadlineError(
                    f"the cluster had no room for the {whose} within {limit_s:g} s, {_told(bundles, count, labels)}; see what "
                    "holds it (ray status), or raise deadlines.start_s"
                )
        except BaseException:
            _remove(groups)
            raise
        found = {
            Place(group, bundle): node
            for group, of_group in zip(groups, nodes, strict=True)
            for bundle, node in (of_group or {}).items()
        }
        places = tuple(found)
        return cls(tuple(places[index] for index in side_by_side(dict(enumerate(found.values())))))

    def of(self, index: int, size: int = 1) -> tuple[Place, ...]:
        """The places of a set of so many."""
        return self.places[index * size : (index + 1) * size]

    def remove(self) -> None:
        """Give the places back; what runs there is ended."""
        _remove(list(dict.fromkeys(place.group for place in self.places)))


def _ask_for(bundles: Sequence[Mapping[str, float]], count: int, labels: Mapping[str, str]) -> list[Any]:
    """Ray's placement groups: one, or one for each set of several places."""
    from ray.util import placement_group

    each = [dict(bundle) for bundle in bundles]
    if len(each) == 1:
        return [placement_group(each * count, "PACK", bundle_label_selector=[dict(labels)] * count)]
    selector = [dict(labels)] * len(each)
    return [placement_group(each, "STRICT_PACK", bundle_label_selector=selector) for _ in range(count)]


def _told(bundles: Sequence[Mapping[str, float]], count: int, labels: Mapping[str, str]) -> str:
    total: dict[str, float] = {}
    for name, amount in (entry for bundle in bundles for entry in bundle.items()):
        total[name] = total.get(name, 0) + amount
    together = ", each on one node" if len(bundles) > 1 else ""
    where = f" on nodes with the labels {dict(labels)}" if labels else ""
    return f"{count} x {total}{together}{where}"


def _remove(groups: Sequence[Any]) -> None:
    import ray

    for group in groups:
        ray.util.remove_placement_group(group)


async def _nodes(group: Any, give_up: float) -> dict[int, str] | None:
    """The node of each bundle of a group, by its index, once all have one; None: not before `give_up`."""
    import ray

    while (table := ray.util.placement_group_table(group))["state"] != "CREATED":
        if time.monotonic() >= give_up:
            return None
        await asyncio.sleep(POLL_S)
    nodes: dict[int, str] = table["bundles_to_node_id"]
    return dict(sorted(nodes.items()))


def side_by_side(nodes: Mapping[int, str]) -> tuple[int, ...]:
    """The places in such an order that those of a node follow each other; the nodes in the order of their first places."""
    first: dict[str, int] = {}
    for index in sorted(nodes):
        first.setdefault(nodes[index], index)
    return tuple(sorted(nodes, key=lambda index: (first[nodes[index]], index)))


async def reserve_pairs(config: RunConfig) -> Places:
    """A GPU for each learner rank, which it shares with an engine; those of an engine are on one node. Raises DeadlineError."""
    rollout, learner = config.rollout, config.learner
    of_rank = {"GPU": 1.0, **_asked(learner, 0)}
    of_both = dict(of_rank)
    for name, amount in _asked(rollout, 0).items():
        of_both[name] = of_both.get(name, 0) + amount
    bundles = [of_both, *[of_rank] * (rollout.engine_size - 1)]
    return await Places.reserve(
        bundles, rollout.num_actors, rollout.labels, config.deadlines.start_s, "engines and learners"
    )


async def reserve_ranks(learner: LearnerConfig, num_gpus: float, limit_s: float) -> Places | None:
    """A place for each learner rank; None: one alone, or ranks that ask for nothing, may be anywhere. Raises DeadlineError."""
    bundle = _asked(learner, num_gpus)
    if learner.num_actors == 1 or not bundle:
        return None
    return await Places.reserve([bundle], learner.num_actors, learner.labels, limit_s, "learners")


def _asked(kind: RolloutConfig | LearnerConfig, num_gpus: float) -> dict[str, float]:
    return {name: n for name, n in {"CPU": kind.num_cpus, "GPU": num_gpus, **kind.resources}.items() if n}


def placed(kind: WorkerConfig, places: Places | None = None, index: int = 0) -> dict[str, Any]:
    """The placement options of an actor of this kind: the place of this index; without places, any node that has what it asks
    for."""
    resources = {"resources": dict(kind.resources)} if kind.resources else {}
    if places is not None:
        return resources | places.places[index].options()
    return resources | ({"label_selector": dict(kind.labels)} if kind.labels else {})
