"""No program holds more than its sandbox allows, also where no process is charged for it; what can't be measured is ended."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.errors import RewardError
from grpo_ray.sandbox import trial, watch
from grpo_ray.sandbox.box import Box, BoxEnded, Limits, Outcome
from grpo_ray.sandbox.isolation import Languages
from grpo_ray.sandbox.trial import check_isolation
from grpo_ray.sandbox.verifier import library_folders

LIMITS = Limits(timeout_s=60.0, cpu_s=30, memory_mb=128, processes=16)
ROOT = str(Path(__file__).parents[2])


def run(source: str, limits: Limits = LIMITS, *python_path: str) -> Outcome:
    async def whole() -> Outcome:
        async with await Box.start(source, limits, Languages(python_path=python_path)) as box:
            return await box.script(b"")

    return asyncio.run(whole())


HIDDEN = {
    "shared anonymous pages that are unmapped": """
import mmap
held = []
for i in range(120):
    m = mmap.mmap(-1, 16 << 20)
    m.write(bytes(16 << 20))
    held.append(m)
""",
    "shared anonymous pages by another name": "import mmap\nmmap.mmap(-1, 16 << 20, 0x23)",
    "/dev/zero": "import mmap, os\nmmap.mmap(os.open('/dev/zero', os.O_RDWR), 16 << 20)",
    "larger buffers of sockets": """
import socket
for s in socket.socketpair(): s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
""",
    "larger pipes": "import fcntl, os\nfcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "larger pipes, by more bits than the kernel reads": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": 72, "aarch64": 25}
if libc.syscall(numbers[os.uname().machine], os.pipe()[1], ctypes.c_long(1 << 32 | 1031), ctypes.c_long(1 << 20)) == -1:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
""",
    "memory files": "import os\nos.ftruncate(os.memfd_create('m'), 1 << 30)",
    "huge pages": "import mmap\nmmap.mmap(-1, 2 << 20, 0x40022)",
    "buffers of terminals": "import os\nos.openpty()",
    "buffers of io_uring": """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.syscall(425, 64, ctypes.create_string_buffer(256)) == -1:
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
""",
    "attributes of files": "import os\nopen('a', 'w').close()\nos.setxattr('a', 'user.a', bytes(60000))",
    "sockets of other families": "import socket\nsocket.socketpair(30)",
}
TOO_MUCH = {
    "memory of many processes": (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0: break\nheld = b'x' * (90 << 20)\ntime.sleep(60)",
        "128 MiB together",
    ),
    "memory of processes whose first thread has ended": (
        """
import ctypes, os, threading, time
for _ in range(7):
    if os.fork() == 0: break
def hold():
    held = b'x' * (30 << 20)
    time.sleep(60)
threading.Thread(target=hold).start()
time.sleep(0.3)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
""",
        "128 MiB together",
    ),
    "buffers of sockets": (
        """
import os, socket, time
for _ in range(7):
    if os.fork() == 0: break
held = [end for _ in range(28) for end in socket.socketpair()]
for end in held:
    end.setblocking(False)
    try:
        while True: end.send(bytes(1 << 16))
    except BlockingIOError: pass
time.sleep(60)
""",
        "128 MiB together",
    ),
    "descriptors of processes whose first thread has ended": (
        """
import ctypes, os, socket, threading, time
for _ in range(7):
    if os.fork() == 0: break
held = [socket.socketpair() for _ in range(28)]
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
""",
        "128 MiB together",
    ),
    "locks": (
        "import fcntl, time\nf = open('f', 'w')\n"
        "for i in range(5000): fcntl.lockf(f, fcntl.LOCK_EX, 1, 2 * i)\ntime.sleep(60)",
        "4096 locks",
    ),
    "files": (
        "import os, time\nfor i in range(6000): os.close(os.open(str(i), os.O_CREAT))\ntime.sleep(60)",
        "4096 files",
    ),
}
ORDINARY = {
    "numpy": """
import numpy as np
assert (np.ones((300, 300)) @ np.ones((300, 300))).sum() == 27e6
assert np.linalg.inv(np.eye(9)).sum() == 9
""",
    "multiprocessing": """
import multiprocessing as mp, sys
mp.set_start_method("fork")
with mp.Pool(3) as pool:
    assert pool.map(abs, range(-9, 0)) == list(range(9, 0, -1))
value, array, queue = mp.Value("i", 0), mp.Array("d", 4), mp.Queue()
def work():
    with value.get_lock(): value.value += 1
    array[1] = 2.5
    queue.put("done")
p = mp.Process(target=work)
p.start()
assert queue.get() == "done"
p.join()
assert (value.value, array[1]) == (1, 2.5)
ours, theirs = mp.Pipe()
ours.send([1])
assert theirs.recv() == [1]
""",
    "shared memory with a name": """
from multiprocessing import shared_memory
m = shared_memory.SharedMemory(create=True, size=1 << 20)
m.buf[:3] = b"abc"
same = shared_memory.SharedMemory(m.name)
assert bytes(same.buf[:3]) == b"abc"
same.close()
m.close()
m.unlink()
""",
    "asyncio and subprocesses": """
import asyncio, subprocess, sys
async def main():
    p = await asyncio.create_subprocess_exec("echo", "7", stdout=asyncio.subprocess.PIPE)
    assert (await p.communicate())[0] == b"7\\n"
    return await asyncio.gather(*(asyncio.sleep(0, i) for i in range(9)))
assert asyncio.run(main()) == list(range(9))
assert subprocess.run("echo 7 | cat", shell=True, capture_output=True).stdout == b"7\\n"
""",
    "threads": """
import concurrent.futures, threading
with concurrent.futures.ThreadPoolExecutor(6) as pool:
    assert sum(pool.map(len, ["a"] * 99)) == 99
""",
    "files, maps of them and databases": """
import mmap, shutil, sqlite3, tempfile
with tempfile.TemporaryDirectory() as folder:
    with open(f"{folder}/f", "w+b") as f:
        f.write(bytes(1 << 16))
        f.flush()
        mmap.mmap(f.fileno(), 1 << 16)[3] = 1
    shutil.copy2(f"{folder}/f", f"{folder}/g")
    db = sqlite3.connect(f"{folder}/db")
    db.execute("create table t (x)")
    db.executemany("insert into t values (?)", [(i,) for i in range(99)])
    db.commit()
    assert db.execute("select sum(x) from t").fetchone() == (4851,)
""",
}


@pytest.mark.parametrize("name", HIDDEN)
def test_memory_that_no_process_is_charged_for_is_refused(name: str) -> None:
    outcome = run(HIDDEN[name])
    assert outcome.code == 1, outcome
    assert outcome.trouble.startswith(("PermissionError", "OSError", "FileNotFoundError")), outcome.trouble


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_no_limit_of_a_process_bounds_ends_the_program(name: str) -> None:
    source, why = TOO_MUCH[name]
    with pytest.raises(BoxEnded, match=why):
        run(source)


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_have_what_they_need(name: str) -> None:
    outcome = run(ORDINARY[name], Limits(timeout_s=120.0, cpu_s=60), *library_folders("numpy"))
    assert (outcome.code, outcome.trouble) == (0, "")


# ---- what can't be measured


def failing(*_: Any) -> str:
    raise watch.UnmeasuredError("measured: no")


def blind(*_: Any) -> str:
    return ""


def test_a_program_that_cannot_be_measured_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_ray.sandbox.box.excess", failing)
    with pytest.raises(RewardError, match="measured: no"):
        run("import time\ntime.sleep(60)")


def test_a_program_cannot_hide_from_the_measure() -> None:
    source = (
        "import ctypes, os, time\nctypes.CDLL(None).prctl(4, 0)\nfor _ in range(3):\n    if os.fork() == 0: break\n"
    )
    source += "held = b'x' * (90 << 20)\ntime.sleep(60)"
    with pytest.raises(BoxEnded, match="128 MiB together"):
        run(source)


@pytest.mark.skipif(os.geteuid() != 0, reason="for root, who lacks CAP_SYS_PTRACE in containers")
@pytest.mark.parametrize(
    "call", ["asyncio.run(check_isolation(Languages()))", "run(TOO_MUCH['memory of many processes'][0])"]
)
def test_root_without_the_right_to_measure_runs_nothing(call: str) -> None:
    script = f"import asyncio\nfrom tests.sandbox.test_sandbox_limits import *\ntry:\n    {call}\n"
    script += "except RewardError as e:\n    print('refused:', e)\nelse:\n    print('it ran')"
    drop = ["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"]
    done = subprocess.run(
        [*drop, sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": ROOT},
        timeout=300,
        check=False,
    )
    assert done.stdout.startswith("refused: "), done.stdout + done.stderr
    assert "can't be measured" in done.stdout
    assert "CAP_SYS_PTRACE" in done.stdout


# ---- the trial


def unlimited(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def loosen(monkeypatch: pytest.MonkeyPatch) -> None:
        inside = (Path(ROOT) / "grpo_ray/sandbox/inside.py").read_text()
        assert "    for name, value in setup[" in inside
        loose = inside.replace(
            "    for name, value in setup[", f"    setup['limits'].pop('{name}')\n    for name, value in setup["
        )
        monkeypatch.setattr("grpo_ray.sandbox.box.INSIDE", loose)

    return loosen


def open_call(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A filter that lets this call through."""

    def loosen(monkeypatch: pytest.MonkeyPatch) -> None:
        from grpo_ray.sandbox import isolation

        kept = tuple(rule for rule in isolation._REFUSED_WITH if rule[0] != name)
        monkeypatch.setattr(isolation, "_REFUSED_WITH", kept)
        monkeypatch.setattr(isolation, "REFUSED", isolation.REFUSED.replace(f" {name} ", " "))
        fresh = isolation.syscall_filter.__wrapped__
        monkeypatch.setattr("grpo_ray.sandbox.box.syscall_filter", fresh)

    return loosen


@pytest.mark.parametrize(
    ("loosen", "trouble"),
    [
        (unlimited("RLIMIT_AS"), "takes memory without end|128 MiB together"),
        (unlimited("RLIMIT_FSIZE"), "writes a file without end"),
        (unlimited("RLIMIT_NOFILE"), "opens files without end"),
        (unlimited("RLIMIT_NPROC"), "forks without end"),
        (open_call("mmap"), "maps shared memory without a file"),
        (open_call("setsockopt"), "enlarges the buffers of a socket"),
        (open_call("fcntl"), "enlarges a pipe"),
        (open_call("memfd_create"), "makes memory files"),
        (open_call("setxattr"), "gives files attributes"),
        (open_call("io_uring_setup"), "calls io_uring_setup"),
    ],
)
def test_the_trial_tries_each_limit(
    loosen: Callable[[pytest.MonkeyPatch], None], trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loosen(monkeypatch)
    with pytest.raises(RewardError, match=trouble):
        asyncio.run(check_isolation(Languages()))


WATCHED = [e for e in trial.EXCESSES if e.limits is trial.LIMITS]


@pytest.mark.parametrize("excess", WATCHED, ids=[e.what for e in WATCHED])
def test_the_trial_tries_what_the_watch_is_for(excess: trial.Excess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_ray.sandbox.box.excess", blind)
    brief = replace(excess, limits=replace(excess.limits, timeout_s=0.5))
    monkeypatch.setattr(trial, "EXCESSES", (brief,))
    with pytest.raises(RewardError, match=f"a program that {excess.what} was not ended for it"):
        asyncio.run(check_isolation(Languages()))
