"""The start of a run's controller: an actor whose imports take seconds, for which the starting process need not wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.cluster import CONTROLLER_LOG, controller_name
from actors.runtime import NO_RECORDS, own_process
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.names import run_name
from grpo_ray.telemetry.events import Event

if TYPE_CHECKING:
    from grpo_ray.rewards.columns import ColumnNeeds


def start_controller(
    kind: str,
    config: RunConfig | SftConfig,
    run_dir: Path,
    resume_step: int | None,
    *,
    needs: Sequence[ColumnNeeds] = (),
    detached: bool = False,
) -> Any:
    """The handle of a new controller for this run, on this node. The controller does nothing before `run`.

    Args:
        needs: what the rewards take from the data.
        detached: the controller, and all that it starts, outlives this process.

    Raises:
        ConfigError: a run of this name is in progress on the cluster.
    """
    run = run_name(run_dir)
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(Controller).options(
        name=controller_name(run),
        lifetime="detached" if detached else None,
        num_cpus=0,
        scheduling_strategy=here,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
        **NO_RECORDS,
    )
    try:
        return actor.remote(kind, config, str(run_dir.resolve()), resume_step, needs, detached)
    except ValueError:
        raise ConfigError(
            f"a run named {run} is under way on this cluster: `grpo-ray logs {run}` shows it, `grpo-ray stop {run}` ends it; or "
            "choose another name with name=..."
        ) from None


class Controller:
    """`actors.control.controller.Controller` as an actor; its imports and output are in the run's log from the first line."""

    def __init__(
        self,
        kind: str,
        config: RunConfig | SftConfig,
        run_dir: str,
        resume_step: int | None,
        needs: Sequence[ColumnNeeds] = (),
        detached: bool = False,
    ) -> None:
        own_process(run_dir, CONTROLLER_LOG)
        from actors.control import controller

        self._controller = controller.Controller(kind, config, run_dir, resume_step, needs, detached)

    async def run(self) -> None:
        await self._controller.run()

    async def events(self, after: int, wait_s: float) -> tuple[list[Event], int]:
        return await self._controller.events(after, wait_s)

    async def stop(self, reason: str, now: bool = False) -> None:
        await self._controller.stop(reason, now)

    async def scale(self, words: Sequence[str]) -> str:
        return await self._controller.scale(words)
