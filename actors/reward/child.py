"""The process in which reward functions run: `python -m actors.reward.child REQUEST_FD RESPONSE_FD`.

It is persistent, since a fork per sample costs 12 ms; it is a process, since only a kill stops a loop in C. It reads
calls from one pipe and writes one JSON line per call, in order, to the other. Pickle goes down only: what comes back
was near untrusted code and text. Functions run in the main thread: math-verify's clock is a signal.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass

import psutil

from actors.reward.answers import encode
from actors.reward.apart import leave_network
from actors.reward.inside import extend_search_path, limit_memory, open_pipes, read_message, reply
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.plain_terminal import clean_streams
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs, check_environments
from grpo_ray.rewards.functions.scoring import call_reward, failures
from grpo_ray.rewards.table import resolve
from grpo_ray.types import RewardScore, ScoreStatus

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
    with_environments: bool = False
    """Whether the run has environments, where functions that name them are called."""


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
    requests, responses = open_pipes()
    me = os.getpid()
    setup: Setup = pickle.loads(read_message(requests))
    extend_search_path(setup.search_path)
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
            if not setup.with_environments:
                check_environments(functions[-1])
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


if __name__ == "__main__":
    main()
