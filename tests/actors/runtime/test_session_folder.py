"""Ray as a command starts it on this machine: its folder is out of other users' reach, its ports ask for the token."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from actors.private import is_closed, why_open
from grpo_ray.secrets import token_path
from tests.strangers import IS_ROOT, as_nobody, shared_folder

pytestmark = pytest.mark.timeout(300)
HEALTH = "/api/local_raylet_healthz"


@dataclass(frozen=True)
class Alone:
    session: Path
    warning: str | None
    ports: list[tuple[str, str, int]]
    """Process, address and port."""
    home: Path
    commands: list[str]
    """Of the node's processes."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """A cluster that was started where another user had been before, by a user who had no token yet."""
    home = tmp_path_factory.mktemp("home")
    left = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with shared_folder() as shared:
        if IS_ROOT:
            assert as_nobody(lambda: (shared / f"grpo-ray-{os.getuid()}").mkdir(0o777)) == "None"
            assert as_nobody(lambda: (shared / "ray").mkdir(0o777)) == "None"
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.actors.runtime.alone"],
            env=left | {"RAY_AUTH_MODE": "token", "HOME": str(home), "TMPDIR": str(shared)},
            cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        session = Path(told["folder"], "session_latest").resolve()
        yield Alone(session, told["open"], [tuple(p) for p in told["ports"]], home, told["commands"])
        process.communicate(timeout=60)


def test_everything_of_a_session_is_out_of_others_reach(alone: Alone) -> None:
    assert is_closed(alone.session)
    assert alone.warning is None
    found = [alone.session, *alone.session.rglob("*")]
    assert {"logs", "sockets", "runtime_resources"} <= {path.name for path in found}
    # Ray makes them for all users.
    assert any(path.lstat().st_mode & 0o002 for path in found if not path.is_symlink())
    assert [path for path in found if why_open(path) is not None] == []
    token = token_path({"HOME": str(alone.home)})
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_nothing_is_started_that_is_idle_in_a_run(alone: Alone) -> None:
    started = " ".join(alone.commands)
    assert [name for name in ("gcs_server", "raylet", "RuntimeEnvAgent", "DashboardAgent") if name not in started] == []
    assert [name for name in ("monitor.py", "dashboard.py", "log_monitor") if f"/{name}" in started] == []
    assert sum(command.startswith("ray::") and "Agent" not in command for command in alone.commands) == 1, started


@pytest.mark.skipif(not IS_ROOT, reason="needs root, for a second user")
def test_another_user_can_neither_replace_code_nor_turn_a_log_into_a_link_nor_talk_to_rays_sockets(
    alone: Alone,
) -> None:
    package = alone.session / "runtime_resources" / "package"
    package.mkdir(parents=True, exist_ok=True)
    log = alone.session / "logs" / "raylet.out"
    (store,) = alone.session.glob("sockets/plasma_store*")

    def talk() -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(store))

    talk()
    assert as_nobody(lambda: (package / "module.py").touch()) == "PermissionError"
    assert as_nobody(lambda: package.rename(f"{package}.away")) == "PermissionError"
    assert as_nobody(lambda: log.unlink()) == "PermissionError"
    assert as_nobody(lambda: log.with_name("next.out").symlink_to("/etc/passwd")) == "PermissionError"
    assert as_nobody(lambda: os.listdir(alone.session.parent)) == "PermissionError"
    assert as_nobody(talk) == "PermissionError"


def test_without_the_token_rays_ports_tell_of_health_and_metrics_and_do_nothing(alone: Alone) -> None:
    def ask(host: str, port: int, path: str, body: bytes | None = None) -> int:
        """The status; 0: it speaks no HTTP."""
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"http://{host}:{port}{path}", data=body), timeout=60
            ) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as e:
            return e.code
        except (OSError, http.client.HTTPException):
            return 0

    def statuses(host: str, port: int) -> frozenset[int]:
        if not (read := ask(host, port, "/logs")):
            return frozenset({0})
        done = (ask(host, port, path, b"{}") for path in ("/api/job_agent/jobs/", "/get_or_create_runtime_env"))
        return frozenset({read, *done})

    grpc, asks, metrics = frozenset({0}), frozenset({401}), frozenset({200, 405})
    found = [
        (address, statuses("127.0.0.1" if address in ("::", "0.0.0.0") else address, port))
        for _, address, port in alone.ports
    ]
    assert {each for _, each in found} == {grpc, asks, metrics}
    assert {address for address, each in found if each == metrics} == {"0.0.0.0"}
    # Of several clusters on a machine one has this port, and the agents of the others do without.
    agents = [(host, port) for name, host, port in alone.ports if "DashboardA" in name and port == 52365]
    assert sum(each == asks for _, each in found) >= 1 + len(agents)
    assert {ask(host, port, HEALTH) for host, port in agents} <= {200}
