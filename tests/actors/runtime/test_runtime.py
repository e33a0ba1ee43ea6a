"""What every actor of a run has in common."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from actors.runtime import RayActors, own_scratch, use_nodes_interface


class Counter:
    async def call_of_ours(self) -> int:
        return 1


class Other:
    async def call_of_others(self) -> int:
        return 1


class Connecting:
    async def interfaces(self, on_one_node: bool) -> tuple[str, str]:
        use_nodes_interface(on_one_node=on_one_node)
        return os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_gloo_connects_by_the_address_that_ray_has_for_the_node_and_by_loopback_on_one_alone() -> None:
    import ray

    actors = [RayActors().start(Connecting, num_cpus=0) for _ in range(2)]
    (gloo, nccl), (alone, still) = ray.get([a.interfaces.remote(n == 1) for n, a in enumerate(actors)])
    addresses = {name: {entry.address for entry in entries} for name, entries in psutil.net_if_addrs().items()}
    assert ray.util.get_node_ip_address() in addresses[gloo]
    assert nccl == still == f"={gloo}"
    assert "127.0.0.1" in addresses[alone]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_rays_head_keeps_no_record_of_our_calls() -> None:
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


def test_what_an_actor_left_that_was_killed_goes_with_its_next_life_and_what_lives_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(30)

    def live(run_dir: str, pid: int) -> Path:
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        monkeypatch.setattr("actors.folders.LONGEST_FOLDER", 1000)
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(os, "getpid", lambda: pid)
        folder = own_scratch(run_dir, "rollout-0")
        Path(tempfile.mkstemp()[1]).touch()
        return folder

    _killed, other, alive = live("run", gone.pid), live("other", gone.pid), live("run", os.getppid())
    again = live("run", gone.pid)
    assert sorted(tmp_path.iterdir()) == sorted([other, alive, again])
    assert [len(list(folder.iterdir())) for folder in (other, alive, again)] == [1, 1, 1]


def test_a_folder_too_deep_for_sockets_is_no_place_for_temporary_files_and_a_short_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / "a" / ("b" * 60)
    deep.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder = own_scratch("run", "rollout-0")
    assert tempfile.gettempdir() == str(folder)
    assert len(str(folder)) + len("/") + 36 <= 107
    assert not list(deep.iterdir())
    folder.rmdir()
