"""Third-party code that judges texts: what it does to its worker costs the text its value, and no other text anything."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from grpo_ray.errors import RewardError
from grpo_ray.sandbox.box import Limits
from grpo_ray.sandbox.verifier import Ended, Verifier, sendable

SOURCE = """
import os, sys, time
seen = []
def verify(what, x):
    seen.append(x)
    if what == "die": os._exit(3)
    if what == "kill": os.kill(os.getpid(), 9)
    if what == "loop":
        while True: pass
    if what == "eat": return len(b"x" * (400 << 20))
    if what == "raise": raise ValueError("no")
    if what == "leak": seen.append(b"x" * (100 << 20))
    if what == "kill all": os.kill(-1, 9)
    if what == "fork": os.fork() or time.sleep(60)
    if what == "seen": return len(seen)
    if what == "large": return "x" * (1 << 18)
    if what == "open": open(x)
    if what == "write": os.write(1, b'9\\n')
    return x
"""
FILES = Path(__file__).parents[2] / "grpo_ray" / "sandbox"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    limits = Limits(timeout_s=float("inf"), cpu_s=1, memory_mb=256, processes=2, file_mb=1, disk_mb=2)
    made = Verifier(SOURCE, (), limits)
    yield made
    made.close()


def test_each_item_has_its_result_in_order(verifier: Verifier) -> None:
    assert verifier([("", i) for i in range(700)]) == list(range(700))
    assert verifier([]) == []


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("die", "exit code 3"),
        ("kill", "signal 9"),
        ("loop", "signal 24"),
        ("eat", "MemoryError"),
        ("raise", "ValueError: no"),
        ("kill all", ""),
        ("large", ""),
        ("open", "FileNotFoundError"),
    ],
)
def test_an_item_that_ends_the_worker_costs_no_other_one_anything(verifier: Verifier, what: str, words: str) -> None:
    results = verifier([("", 1), (what, "/etc/passwd"), ("", 2), (what, "/etc/passwd"), ("", 3)])
    assert [results[i] for i in (0, 2, 4)] == [1, 2, 3]
    assert all(isinstance(results[i], Ended) and words in results[i].how for i in (1, 3)), results


def test_memory_that_items_leave_behind_is_not_the_next_ones_fault(verifier: Verifier) -> None:
    assert verifier([("leak", i) for i in range(6)]) == list(range(6))


def test_what_a_verifier_prints_is_no_result(verifier: Verifier) -> None:
    assert verifier([("write", 1), ("", 2)]) == [1, 2]


def test_a_sandbox_that_was_killed_is_followed_by_another(verifier: Verifier) -> None:
    verifier.start()
    assert verifier._session is not None
    os.kill(verifier._session._box._first_pid, signal.SIGKILL)
    assert verifier([("", 1), ("", 2)]) == [1, 2]


def test_a_forked_process_has_a_sandbox_of_its_own(verifier: Verifier) -> None:
    assert verifier([("", 1)]) == [1]
    pid = os.fork()
    if pid == 0:
        right = verifier([("", 2)]) == [2]
        verifier.close()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert verifier([("", 3)]) == [3]


def test_imports_that_fail_are_said() -> None:
    with pytest.raises(RewardError, match="no_such_module"):
        Verifier(SOURCE, ("no_such_module",)).start()


def test_only_plain_values_are_sent() -> None:
    value = {"a": (np.str_("x"), np.int64(3), [np.array([1.5])]), 2: {b"b", None}}
    assert sendable(value) == {"a": ("x", 3, [[1.5]]), 2: {b"b", None}}
    assert type(sendable(np.str_("x"))) is str
    with pytest.raises(RewardError, match="a Verifier"):
        sendable({"x": [Verifier("", ())]})
    nested: list[object] = []
    for _ in range(200_000):
        nested = [nested]
    with pytest.raises(RewardError, match="nested too deeply"):
        sendable(nested)
    while nested:
        nested = nested.pop()  # type: ignore[assignment]
