"""What becomes of a change that the cluster has no room for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
import ray

from actors.control.scaler import RunScaler
from grpo_ray.config.scaling import Counts
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ResourceError
from grpo_ray.loop.roles import Learner, WeightSync
from grpo_ray.run.checkpoint_store import CheckpointLocation
from tests.config.test_scaling import config


@dataclass
class WorkerGroup:
    asked: list[RunConfig] = field(default_factory=list)
    num_learners = 1

    def take_most_waiting(self) -> Counts:
        return {"rollout": 0, "reward": 0}

    def reconfigure(self, config: RunConfig) -> None:
        self.asked.append(config)

    async def change_learner(self, place: CheckpointLocation | None) -> tuple[Learner, WeightSync]:
        raise AssertionError("nobody asked for other learners")


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_ends_waits_for_no_room_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # To a cluster of this name nodes may come.
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    crew, recorded = WorkerGroup(), list[Counts]()
    scaler = RunScaler(config(deadlines={"resources_s": 300}), crew, recorded.append, lambda level, text: None)

    async def end_while_it_waits() -> None:
        scaling = asyncio.create_task(scaler.scale(["reward=5000"]))
        await asyncio.sleep(1.0)
        assert not scaling.done()
        await scaler.close()
        with pytest.raises(ResourceError, match="the run has ended"):
            await scaling

    asyncio.run(asyncio.wait_for(end_while_it_waits(), 60))
    assert crew.asked == []
    assert recorded == []
