"""A trial of the sandbox before anything is run in it: programs that try what must not work, and each limit once."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from grpo_ray.errors import RewardError
from grpo_ray.sandbox import box
from grpo_ray.sandbox.box import OPEN_FILES, Box, BoxEnded, Limits
from grpo_ray.sandbox.isolation import MEND, Languages
from grpo_ray.sandbox.watch import MAX_FILES, MAX_LOCKS, UnmeasuredError

LIMITS = Limits(timeout_s=60.0, cpu_s=30, memory_mb=128, processes=8, file_mb=1, disk_mb=4)

# Each line is something that must not work; those that do are printed.
HOLES = f"""
import ctypes, errno, fcntl, mmap, os, resource, socket

def breach(what, attempt, *args):
    try:
        attempt(*args)
    except (OSError, ValueError, MemoryError):
        return
    print(what)

if left := [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line and "lo:" not in line]:
    print("it sees the network interfaces", *left)
breach("it opens a socket", socket.socket)
breach("it writes to the root", open, "/grpo-ray-breach", "w")
breach("it writes to /dev", open, "/dev/grpo-ray-breach", "w")
breach("it writes to /usr", open, "/usr/grpo-ray-breach", "w")
breach("it raises its limit of processes", resource.setrlimit, resource.RLIMIT_NPROC, (9999, 9999))
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000) == 0:
    print("it makes a user namespace")
if libc.shmget(0, 4096, 0o1600) >= 0:
    print("it makes System V memory")
if os.getuid() != 65534:
    print("it runs as user", os.getuid())
if len(pids := [p for p in os.listdir("/proc") if p.isdigit()]) > 2:
    print("it sees the processes", *pids)
if left := set(os.environ) - {{"PATH", "HOME", "LANG", "PWD", "OMP_NUM_THREADS"}}:
    print("it has the environment", *left)
for path in ("/etc/passwd", "/sys/kernel", "/run/lock"):
    if os.path.exists(path):
        print("it sees", path)
if (status := open("/proc/self/status").read()) and ("NoNewPrivs:\\t1" not in status or "CapEff:\\t0000000000000000" not in status):
    print("it has privileges")

def shared(path):
    mmap.mmap(os.open(path, os.O_RDWR), 4096)
def buffers():
    socket.socketpair()[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
def attribute():
    open("/tmp/attribute", "w").close()
    os.setxattr("/tmp/attribute", "user.a", b"a")
breach("it maps shared memory without a file", mmap.mmap, -1, 4096)
breach("it maps /dev/zero", shared, "/dev/zero")
breach("it makes memory files", os.memfd_create, "breach")
breach("it enlarges the buffers of a socket", buffers)
breach("it enlarges a pipe", fcntl.fcntl, os.pipe()[1], 1031, 1 << 20)
breach("it makes pairs of sockets of another family", socket.socketpair, 30)
breach("it makes terminals", os.openpty)
breach("it gives files attributes", attribute)
breach("it takes huge pages", mmap.mmap, -1, 2 << 20, 0x40022)
for name, number in {{"io_uring_setup": 425, "landlock_create_ruleset": 444, "memfd_secret": 447}}.items():
    if libc.syscall(number, 0, 0, 0) != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
        print("it calls", name)
if libc.mq_open(b"/breach", os.O_CREAT | os.O_RDWR, 0o600, None) != -1:
    print("it makes message queues")

def fill(folder, size, count):
    for i in range(count):
        with open(f"{{folder}}/{{i}}", "wb") as f:
            f.write(bytes(size))
def filled(folder, size, count):
    try:
        fill(folder, size, count)
    finally:
        for name in os.listdir(folder):
            os.remove(f"{{folder}}/{{name}}")
breach("it writes a file without end", filled, "/tmp", {(LIMITS.file_mb << 20) + 1}, 1)
breach("it fills /tmp without end", filled, "/tmp", {LIMITS.file_mb << 20}, 16)
breach("it fills /dev/shm without end", filled, "/dev/shm", {LIMITS.file_mb << 20}, 16)
breach("it takes memory without end", bytearray, {LIMITS.memory_mb << 20})
def opened():
    files = []
    try:
        files += [os.open("/dev/null", os.O_RDONLY) for _ in range({OPEN_FILES})]
    finally:
        os.closerange(3, {OPEN_FILES})
breach("it opens files without end", opened)
try:
    for _ in range({2 * LIMITS.processes}):
        if os.fork() == 0:
            os.read(os.pipe()[0], 1)
    print("it forks without end")
except OSError:
    pass
print("tried", end="")
"""


@dataclass(frozen=True)
class Excess:
    """A program that has to be ended, and the words in the reason."""

    what: str
    program: str
    end: str
    limits: Limits = LIMITS


EXCESSES = (
    Excess("computes without end", "while True: pass", "signal 24", Limits(timeout_s=60.0, cpu_s=1)),
    Excess(
        "takes memory in many processes",
        "import os, time\nfor _ in range(4):\n    if os.fork() == 0: break\n"
        f"held = b'x' * {LIMITS.memory_mb << 19}\ntime.sleep(60)",
        f"{LIMITS.memory_mb} MiB together",
    ),
    Excess(
        "takes memory in the buffers of sockets",
        f"import os, socket, time\nfor _ in range({LIMITS.processes - 2}):\n    if os.fork() == 0: break\n"
        f"held = [socket.socketpair() for _ in range({OPEN_FILES // 2 - 4})]\ntime.sleep(60)",
        f"{LIMITS.memory_mb} MiB together",
    ),
    Excess(
        "makes files without end",
        f"import os, time\nfor i in range({MAX_FILES + 9}): os.close(os.open(f'/tmp/{{i}}', os.O_CREAT))\ntime.sleep(60)",
        f"{MAX_FILES} files",
    ),
    Excess(
        "takes locks without end",
        f"import fcntl, time\nf = open('/tmp/f', 'w')\nfor i in range({MAX_LOCKS + 9}): fcntl.lockf(f, fcntl.LOCK_EX, 1, 2 * i)\n"
        "time.sleep(60)",
        f"{MAX_LOCKS} locks",
    ),
    Excess("runs without end", "import time\ntime.sleep(60)", "out of time", Limits(timeout_s=0.2)),
)
_held: set[tuple[object, object]] = set()
"""The watches with which EXCESSES were tried in this process; they take a second and a half of processor time."""


async def check_isolation(languages: Languages) -> None:
    """Run programs that try to escape, and to exceed each limit.

    Raises:
        RewardError: no sandbox can be started, or it is not tight; says which, and the fix.
    """
    for folder in languages.folders:
        if not os.path.isdir(folder):
            raise RewardError(f"there is no folder {folder!r} to show to programs; mend read_only or python_path")
        if os.geteuid() == 0 and os.stat(folder).st_mode & 0o005 != 0o005:
            raise RewardError(
                f"folder {folder!r} is root's alone, and under root programs run as nobody; chmod o+rx, or run as another user"
            )
    try:
        async with await Box.start(HOLES, LIMITS, languages) as cage:
            outcome = await cage.script(b"")
    except (BoxEnded, TimeoutError, UnmeasuredError) as e:
        raise RewardError(f"the sandbox ended in its own trial ({type(e).__name__}: {e}). {MEND}") from None
    said = outcome.output.decode(errors="replace").splitlines()
    if said != ["tried"]:
        raise _not_tight("; ".join(said[:5]) or outcome.trouble or f"exit code {outcome.code}")
    watched = Box._watch, box.excess
    if watched in _held:
        return
    for excess, end in zip(EXCESSES, await asyncio.gather(*(_end(e, languages) for e in EXCESSES)), strict=True):
        if excess.end not in end:
            raise _not_tight(f"a program that {excess.what} was not ended for it; it said: {end}")
    _held.add(watched)


async def _end(excess: Excess, languages: Languages) -> str:
    async with await Box.start(excess.program, excess.limits, languages) as cage:
        try:
            outcome = await cage.script(b"")
        except BoxEnded as e:
            return str(e)
        except TimeoutError:
            return "out of time"
    return outcome.trouble or f"signal {-outcome.code}"


def _not_tight(trouble: str) -> RewardError:
    return RewardError(f"the sandbox is not tight: {trouble}. {MEND}")
