"""A cluster as a command starts it on this machine, with Ray's token: `python -m tests.actors.runtime.alone` tells its folder and
ports, and ends when its input does."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field

import psutil
import ray

from actors.cluster import connect, open_session
from grpo_ray.config.runtime import ClusterConfig


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


if __name__ == "__main__":
    connect(Alone())
    ray.get(work.remote())
    folder = ray.get_runtime_context().get_temp_dir()
    told = {"folder": folder, "open": open_session(), "ports": ports(), "commands": commands()}
    print(json.dumps(told), flush=True)
    sys.stdin.read()
    ray.shutdown()
