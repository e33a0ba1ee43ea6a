"""What every actor of a run has in common."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from actors.runtime import RayActors, use_nodes_interface


class Counter:
    async def call_of_ours(self) -> int:
        return 1


class Other:
    async def call_of_others(self) -> int:
        return 1


class Connecting:
    async def interface(self) -> str:
        use_nodes_interface()
        return os.environ["GLOO_SOCKET_IFNAME"]


@pytest.mark.timeout(120)
def test_gloo_connects_by_the_address_that_ray_has_for_the_node(local_ray) -> None:
    import ray

    interface = ray.get(RayActors().start(Connecting, num_cpus=0).interface.remote())
    assert ray.util.get_node_ip_address() in {entry.address for entry in psutil.net_if_addrs()[interface]}


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
