"""The fork that an engine's core is on CPUs, without an engine."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from actors.rollout.forked_core import Forking, missing_preloads

ROOT = Path(__file__).parents[3]


def tell_and_wait(write: int, connection: int) -> None:
    told = (stat.S_ISSOCK(os.fstat(connection).st_mode), gc.get_freeze_count() > 0, gc.get_threshold()[0])
    os.write(write, repr(told).encode())
    time.sleep(60)


@pytest.mark.timeout(60)
def test_a_connections_other_side_hears_of_its_end_though_a_fork_lives_that_had_it_too() -> None:
    ours, others = socket.socketpair()
    read, write = os.pipe()
    core = Forking().Process(target=tell_and_wait, args=(write, ours.fileno()))
    core.start()
    os.close(write)
    try:
        assert os.read(read, 100).decode() == "(False, True, 700)"
        ours.close()
        others.settimeout(10)
        assert others.recv(1) == b""
        assert core.is_alive()
    finally:
        core.kill()
        core.join(10)


ACTOR = """
import os, signal, time
from actors.rollout.forked_core import Forking

core = Forking().Process(target=time.sleep, args=(60,))
core.start()
print(core.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(60)
def test_a_fork_ends_with_the_process_that_it_was_also_when_that_is_killed() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ACTOR], stdout=subprocess.PIPE, env=env, timeout=50, check=False)
    assert done.returncode == -signal.SIGKILL
    core = int(done.stdout)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(core) and psutil.Process(core).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_library_to_be_loaded_before_all_others_is_missed_where_it_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".so.6")
    )
    link = tmp_path / "link.so"
    link.symlink_to(loaded)
    other = tmp_path / "other.so"
    shutil.copy(sys.executable, other)
    monkeypatch.setenv("LD_PRELOAD", f"{loaded}:{other} {link}")
    assert missing_preloads() == [str(other)]
    monkeypatch.delenv("LD_PRELOAD")
    assert missing_preloads() == []
