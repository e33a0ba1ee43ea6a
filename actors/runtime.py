"""What every actor and pool shares: logs of its own, waits with a deadline, threads that don't compete."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil
import ray
from ray.exceptions import RayActorError

from actors.caches import own_cache, use_private_caches
from actors.devices import hide_other_gpus
from actors.private import use_private_temporary_files
from grpo_ray.errors import DeadlineError
from grpo_ray.names import run_name
from grpo_ray.plain_terminal import clean_streams, say

T = TypeVar("T")

GC_THRESHOLD = 50_000
"""The minimum of surviving new objects between two runs of the garbage collector."""
GC_THRESHOLD_PER_SAMPLE = 32
"""Two or three times the objects that the controller holds per sample in progress: those of a step that begins then trigger no
collection."""
PYTHONS_GC = (700, 10, 10)
NAME_TRIES = 20
LOOPBACK = "127.0.0.1"
NO_RECORDS = {"enable_task_events": False}
"""The options of every actor: otherwise Ray's head keeps 3 KB for each of the last 100,000 calls, and ours are many and small."""

# Large buffers are reused instead of going back to the kernel after every micro-batch.
ALLOCATOR_ENV = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


class Actors(Protocol):
    """Where a pool's actors come from, and how they end: Ray in a run; a simulation of a cluster has its own."""

    def start(self, actor: type, *args: Any, **options: Any) -> Any:
        """A handle of `actor(*args)`; `options` in Ray's words."""
        ...

    def kill(self, handle: Any) -> None:
        """End the actor at once, whatever it is doing."""
        ...


class RayActors:
    def start(self, actor: type, *args: Any, **options: Any) -> Any:
        # The one option that Ray accepts here and nowhere else.
        groups = options.pop("concurrency_groups", {})
        remote = ray.remote(concurrency_groups=groups)(actor)
        return remote.options(**NO_RECORDS, **options).remote(*args)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)


def settle_garbage_collector(samples_under_way: int = 0) -> None:
    """Set the garbage collector of the controller when everything is up. What exists stays to the end (modules, models, prompts)
    and need not be scanned again and again. Nor need thousands of samples in progress, which are freed by themselves: the more
    there are, the more rarely it runs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(max(GC_THRESHOLD, GC_THRESHOLD_PER_SAMPLE * samples_under_way))


def end_of_imports() -> None:
    """Reset the garbage collector of a process that holds tensors, after its imports (see `search_path.IMPORT_GC_THRESHOLD`):
    garbage with tensors in it would fill the memory while it waits for a collector that runs rarely."""
    gc.set_threshold(*PYTHONS_GC)


def start_named(source: Actors, actor: type, *args: Any, run_dir: str, name: str, **options: Any) -> Any:
    """Call `source.start`, under `RUN/name` in Ray's dashboard. Until the cluster has noticed that the one before it is dead, the
    name gets a number.
    """
    name = f"{run_name(Path(run_dir))}/{name}"
    for left in reversed(range(NAME_TRIES)):
        try:
            number = NAME_TRIES - left
            return source.start(actor, *args, name=name if number == 1 else f"{name}.{number}", **options)
        except ValueError:
            if not left:
                raise
    raise AssertionError


def own_log(run_dir: str, name: str) -> Path:
    """Send this process's output (and its children's) to `run_dir/logs/name.log`; the file that errors point to."""
    path = Path(run_dir) / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    clean_streams()
    return path


def own_process(run_dir: str, name: str) -> Path:
    """Begin the process of an actor: its log, see `own_log`, the GPUs that it may see, and folders that other users of the machine
    cannot enter."""
    path = own_log(run_dir, name)
    hide_other_gpus()
    use_private_temporary_files()
    for note in use_private_caches():
        say(f"note: {note}", error=True)
    return path


def use_batch_scheduling() -> None:
    """Put processes that move or score samples under batch scheduling: their threads, and what these start from now on, wait for a
    free core or their turn, and do not preempt an engine or a learner rank when they wake up. On two cores they did, 300 times
    a second."""
    for thread in os.listdir("/proc/self/task"):
        # The thread may have ended; containers may forbid it.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(int(thread), os.SCHED_BATCH, os.sched_param(0))


def own_scratch(run_dir: str, name: str) -> Path:
    """A folder for the temporary files of this process and of those that it starts. What dead processes of that `name` left is
    removed: vLLM deletes nothing when it is killed, which leaves three sockets and a file of each engine."""
    whose = hashlib.blake2b(f"{run_dir}/{name}".encode(), digest_size=4).hexdigest()
    temporary = str(use_private_temporary_files())
    left_over = re.compile(rf"grpo-ray-{whose}-(\d+)-\w+")
    for entry in os.scandir(temporary):
        made = left_over.fullmatch(entry.name)
        # Another may be alive: evaluations share a folder.
        if made and not psutil.pid_exists(int(made[1])):
            shutil.rmtree(entry.path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"grpo-ray-{whose}-{os.getpid()}-", dir=temporary))
    # What torch compiles is for later processes too.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own_cache("torchinductor")))
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    return folder


def use_nodes_interface(*, on_one_node: bool) -> None:
    """Let gloo and NCCL connect this process, and those that it starts, by the address that Ray has for its node; gloo by
    loopback, where its groups are all on one node. By itself gloo takes what the machine's own name resolves to, and NCCL
    listens on whatever interface it finds."""
    address = ray.util.get_node_ip_address()
    if (interface := _interface_of(address)) is not None:
        # NCCL has to reach engines on other nodes, too.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    if (interface := _interface_of(LOOPBACK if on_one_node else address)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface_of(address: str) -> str | None:
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, entries in interfaces if any(e.address == address for e in entries)), None)


def end_with_parent() -> None:
    """Make this process end with the one that started it, however that ended; for processes started by multiprocessing only.
    Otherwise an engine's core outlives its actor, with all its memory, where no raylet is left to end it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def node_died(error: BaseException) -> bool:
    """Whether an actor died because its whole node did, which Ray reports only in the message's text."""
    return isinstance(error, RayActorError) and "node has died" in str(error)


def log_tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for an error message."""
    try:
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return f"(no log at {path})"


def core_error(path: Path, otherwise: str) -> str:
    """What vLLM's engine core died of, from its log; the actor itself only learns that it is gone."""
    errors = re.findall(r"EngineCore.*?\b((?:\w+\.)*\w*(?:Error|Exception): .+)", log_tail(path, lines=1000))
    return str(errors[-1]).strip() if errors else otherwise


async def within(work: Awaitable[T], seconds: float, what: str, option: str) -> T:
    """Await `work`, at most `seconds`.

    Raises:
        DeadlineError: `what` was waited for, and the `option` that sets the limit.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as e:
        if isinstance(e, DeadlineError):
            raise
        raise late(what, seconds, option) from None


def late(what: str, seconds: float, option: str) -> DeadlineError:
    return DeadlineError(f"{what} did not finish within {seconds:g} s; look for it in the logs, or raise {option}")
