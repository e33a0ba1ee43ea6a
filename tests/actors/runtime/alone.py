"""A cluster as a command starts it on this machine, with Ray's token: `python -m tests.actors.runtime.alone` tells its folder and
ports, and ends when its input does."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field

import psutil
import ray

from actors.cluster import connect, open_session
from grpo_ray.config.common import ClusterConfig

AGENTS = ("DashboardA", "RuntimeEnv")
"""Parts of the names of the processes that listen last: a node takes work before."""
AGENTS_S = 20.0


@dataclass(frozen=True)
class Alone:
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(num_cpus=1))


@ray.remote(num_cpus=0)
def work() -> None: ...


def commands() -> list[str]:
    """Of all processes that the node consists of."""
    return [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]


def ports() -> list[tuple[str, str, int]]:
    """Process, address and port of all that listens."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return [
        (process.name(), c.laddr.ip, c.laddr.port)
        for process in family
        for c in process.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    ]


def wait_for_agents() -> None:
    """Wait until each agent listens on the node's own address, the last port that it opens."""
    give_up = time.monotonic() + AGENTS_S
    while time.monotonic() < give_up:
        own = [name for name, address, _ in ports() if address not in ("::", "0.0.0.0")]
        if all(any(agent in name for name in own) for agent in AGENTS):
            return
        time.sleep(0.2)


if __name__ == "__main__":
    connect(Alone())
    ray.get(work.remote())
    wait_for_agents()
    folder = ray.get_runtime_context().get_temp_dir()
    told = {"folder": folder, "open": open_session(), "ports": ports(), "commands": commands()}
    print(json.dumps(told), flush=True)
    sys.stdin.read()
    ray.shutdown()
