"""How long a command waits for its controller."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray

from grpo_ray.errors import WorkerError
from grpo_ray.telemetry.events import EndEvent, Event
from launch.run import follow
from launch.run.live import LiveView


@ray.remote(num_cpus=0)
class SlowToStart:
    """A controller whose imports take three seconds."""

    def __init__(self) -> None:
        time.sleep(3)

    def events(self, after: int, wait_s: float) -> tuple[list[Event], int]:
        return [EndEvent("finished", "")], 1


@pytest.mark.usefixtures("local_ray")
def test_a_controller_may_start_for_longer_than_it_may_be_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(follow, "SILENCE_S", 1.0)
    slow: Any = SlowToStart
    assert follow.follow_events(slow.remote(), LiveView(), tmp_path, start_s=120).status == "finished"
    with pytest.raises(WorkerError, match=r"did not answer for 0\.5 s"):
        follow.follow_events(slow.remote(), LiveView(), tmp_path, start_s=0.5)
