"""The process in which reward functions run: `python -m actors.reward.child REQUEST_FD RESPONSE_FD`.

It is persistent, since a fork per sample costs 12 ms; it is a process, since only a kill stops a loop in C. It reads
calls from one pipe and writes one JSON line per call, in order, to the other. Pickle goes down only: what comes back
was near untrusted code and text. Functions run in the main thread: math-verify's clock is a signal.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import resource
import signal
import struct
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO

import psutil

from actors.reward.apart import leave_network
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.plain_terminal import clean_streams
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward, failures
from grpo_ray.rewards.table import resolve
from grpo_ray.types import RewardScore, ScoreStatus

HEADER = struct.Struct("<Q")
PR_SET_PDEATHSIG = 1
MAX_CHILDREN = 32
CALLS_BETWEEN_COUNTS = 16


@dataclass(frozen=True)
class Setup:
    """The first message: what to import, and the limits."""

    functions: tuple[RewardFunctionConfig, ...]
    memory_bytes: int
    """The address space allowed on top of what the imports took."""
    search_path: tuple[str, ...]
    """`sys.path` of the parent, so that a function is found where the driver would find it."""
    apart: bool
    """Whether the process is cut off from the network."""


@dataclass(frozen=True)
class Call:
    """One function on one sample (or one group)."""

    function: int
    inputs: bytes
    """Pickled ScoreInputs, one copy per call: a function that changes its lists changes nobody else's."""
    lengths: tuple[int, ...]
    """The completion tokens of each sample."""

    @property
    def count(self) -> int:
        return len(self.lengths)


def main() -> None:
    clean_streams()
    requests = os.fdopen(int(sys.argv[1]), "rb")
    responses = int(sys.argv[2])
    die_with_parent()
    me = os.getpid()

    def leave_the_pipes() -> None:
        # A child that a function forked must neither hold the pipes open nor answer in our name.
        os.close(requests.fileno())
        os.close(responses)

    os.register_at_fork(after_in_child=leave_the_pipes)
    setup: Setup = pickle.loads(read_message(requests))
    sys.path.extend(p for p in setup.search_path if p not in sys.path)
    if setup.apart:
        leave_or_refuse(responses)
    functions = import_functions(setup, responses)
    limit_memory(setup.memory_bytes)
    reply(responses, {"ready": True, "per_sample": [function.per_sample for function in functions]})
    calls_done = 0
    while True:
        calls: list[Call] = pickle.loads(read_message(requests))
        for call in calls:
            results = run_call(functions[call.function], call)
            if os.getpid() != me:
                os._exit(0)
            sys.stdout.flush()
            sys.stderr.flush()
            calls_done += 1
            spent = out_of_memory(results) or too_many_children(calls_done)
            reply(responses, {"scores": [encode(r) for r in results], "spent": spent})
            if spent:
                os._exit(0)


def leave_or_refuse(responses: int) -> None:
    try:
        leave_network()
    except RewardError as e:
        reply(responses, {"refused": str(e)})
        sys.exit(1)


def import_functions(setup: Setup, responses: int) -> list[RewardFunction]:
    """Resolve every function, reporting which one is being imported: the parent names it if this never ends."""
    functions = []
    for config in setup.functions:
        reply(responses, {"importing": config.name})
        try:
            functions.append(resolve(config, load=True))
        except RewardError as e:
            reply(responses, {"refused": str(e)})
            sys.exit(1)
    return functions


def run_call(function: RewardFunction, call: Call) -> list[RewardScore]:
    try:
        inputs: ScoreInputs = pickle.loads(call.inputs)
    except Exception as e:
        detail = f"the row can't be rebuilt in the scoring process: {type(e).__name__}: {e}"
        return failures(function.name, call.count, ScoreStatus.ERROR, detail, 0.0)
    return call_reward(function, inputs)


def out_of_memory(results: list[RewardScore]) -> bool:
    """Whether memory ran out: what filled it may still be held, and would fail every later call."""
    return any(r.status is ScoreStatus.ERROR and r.detail.startswith("MemoryError") for r in results)


def too_many_children(calls_done: int) -> bool:
    """Whether functions leave processes behind. A few may be intended (a helper that is kept); many are a leak."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    # Counting reads all of /proc, so not after every call.
    return calls_done % CALLS_BETWEEN_COUNTS == 0 and len(psutil.Process().children()) > MAX_CHILDREN


def encode(result: RewardScore) -> list[Any]:
    """The result as [status, value, detail, seconds, [[end, value], ..]], then extras and metrics where it logs some; NaN has no
    JSON."""
    said: list[Any] = [
        result.status.value,
        result.value if result.status is ScoreStatus.OK else None,
        result.detail,
        result.seconds,
        [[step.end, step.value] for step in result.steps],
    ]
    return [*said, result.extra, result.logged] if result.extra or result.logged else said


def reply(fd: int, message: dict[str, Any]) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


def read_message(requests: BinaryIO) -> bytes:
    """The next length-prefixed message. The end of the pipe is the end of the parent, and so of this process."""
    header = requests.read(HEADER.size)
    if len(header) < HEADER.size:
        os._exit(0)
    (size,) = HEADER.unpack(header)
    body = requests.read(size)
    if len(body) < size:
        os._exit(0)
    return body


def limit_memory(extra_bytes: int) -> None:
    """Cap the address space: an allocation beyond it is a MemoryError here instead of a killed neighbour."""
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as f:
        now = int(f.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra_bytes, now + extra_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def die_with_parent() -> None:
    """Ask Linux for a SIGKILL when the parent dies: a function stuck in C would never notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
