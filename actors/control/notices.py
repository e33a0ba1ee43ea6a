"""Notices that a node will be taken away: a spot instance, a node that an autoscaler or `ray drain-node` drains.

Ray places nothing new on such a node. Whoever drains it ends it at the deadline, with all that runs there: Ray itself does not.

None of Ray's ways to list these nodes is public.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import ray
from ray._private.state import state

POLL_S = 2.0


@dataclass(frozen=True)
class Notice:
    node_id: str
    own: bool
    """Whether it is the node of the asking process."""
    seconds_left: float | None
    """The seconds until the deadline; None: Ray names none."""

    def __str__(self) -> str:
        when = "soon" if self.seconds_left is None else f"in {self.seconds_left:.0f} s"
        return f"node {self.node_id[:12]} is taken away {when}"


class Loop(Protocol):
    """The loop of a run, as notices need it."""

    def stop(self, reason: str) -> None: ...

    def checkpoint_soon(self) -> None: ...


def handle_preemption(notice: Notice, loop: Loop) -> str:
    """Make a checkpoint while there is time, since a lost node costs what came after the newest one. Returns the text to report."""
    if notice.own:
        loop.stop("preempted")
        return f"{notice}, and this run with it: it ends after the step under way, with a checkpoint"
    loop.checkpoint_soon()
    return f"{notice}: a checkpoint after the step under way"


async def watch_notices(on_notice: Callable[[Notice], None]) -> None:
    """Report each node once; runs until cancelled."""
    own = ray.get_runtime_context().get_node_id()
    told: set[str] = set()
    while True:
        draining: dict[str, int] = await asyncio.to_thread(state.get_draining_nodes)
        for node_id in draining.keys() - told:
            left = max(0.0, draining[node_id] / 1000 - time.time()) if draining[node_id] else None
            on_notice(Notice(node_id, node_id == own, left))
        told = set(draining)
        await asyncio.sleep(POLL_S)
