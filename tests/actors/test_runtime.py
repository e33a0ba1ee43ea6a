"""What every actor of a run has in common."""

from __future__ import annotations

import time

import pytest

from actors.runtime import RayActors


class Counter:
    async def call_of_ours(self) -> int:
        return 1


class Other:
    async def call_of_others(self) -> int:
        return 1


@pytest.mark.timeout(120)
def test_rays_head_keeps_no_record_of_our_calls(local_ray) -> None:
    import ray

    ours = RayActors().start(Counter, num_cpus=0)
    others = ray.remote(Other).options(num_cpus=0).remote()
    assert sum(ray.get([ours.call_of_ours.remote() for _ in range(50)])) == 50
    assert sum(ray.get([others.call_of_others.remote() for _ in range(50)])) == 50
    deadline = time.monotonic() + 30
    while len(kept := [e["name"] for e in ray.timeline()]) < 50 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert sum("call_of_others" in name for name in kept) >= 50
    assert sum("call_of_ours" in name for name in kept) == 0
