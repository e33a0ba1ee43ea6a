"""Ray's session folder, sockets and logs of a cluster that a command starts: no other user of the machine has a way in."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import ray

from actors.cluster import connect, open_session
from actors.private import is_closed, why_open
from grpo_ray.config import ClusterConfig
from tests.strangers import IS_ROOT, as_nobody, shared_folder

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Alone:
    cluster: ClusterConfig = field(default_factory=lambda: ClusterConfig(num_cpus=1))


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    """Of a cluster that was started where another user had been before."""
    before = dict(os.environ)
    with shared_folder() as shared:
        os.environ |= {"TMPDIR": str(shared)}
        os.environ.pop("RAY_TMPDIR", None)
        if IS_ROOT:
            assert as_nobody(lambda: (shared / f"grpo-ray-{os.getuid()}").mkdir(0o777)) == "None"
            assert as_nobody(lambda: (shared / "ray").mkdir(0o777)) == "None"
        connect(Alone())
        yield Path(ray.get_runtime_context().get_temp_dir(), "session_latest").resolve()
        ray.shutdown()
    os.environ.clear()
    os.environ.update(before)
    tempfile.tempdir = None


def test_everything_of_the_session_is_out_of_others_reach(session: Path) -> None:
    assert is_closed(session)
    assert open_session() is None
    found = [session, *session.rglob("*")]
    assert {"logs", "sockets", "runtime_resources"} <= {path.name for path in found}
    # Ray makes them for all users.
    assert any(path.stat().st_mode & 0o002 for path in found)
    assert [path for path in found if why_open(path) is not None] == []


@pytest.mark.skipif(not IS_ROOT, reason="needs root, for a second user")
def test_another_user_can_neither_replace_code_nor_turn_a_log_into_a_link_nor_talk_to_rays_sockets(
    session: Path,
) -> None:
    package = session / "runtime_resources" / "package"
    package.mkdir(parents=True, exist_ok=True)
    log = session / "logs" / "raylet.out"
    (store,) = session.glob("sockets/plasma_store*")

    def talk() -> None:
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(store))

    talk()
    assert as_nobody(lambda: (package / "module.py").touch()) == "PermissionError"
    assert as_nobody(lambda: package.rename(f"{package}.away")) == "PermissionError"
    assert as_nobody(lambda: log.unlink()) == "PermissionError"
    assert as_nobody(lambda: log.with_name("next.out").symlink_to("/etc/passwd")) == "PermissionError"
    assert as_nobody(lambda: os.listdir(session.parent)) == "PermissionError"
    assert as_nobody(talk) == "PermissionError"
