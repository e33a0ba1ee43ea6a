"""Tests in one sandbox, the program in another: what a program raises or returns ends no test early, and right programs pass."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.sandbox.remote import ProgramError, rebuilt
from grpo_ray.types import RewardScore, ScoreStatus

CASES = "cases = [(1, 2), (3, 4)]\n"
# Each passes if its iteration ends before the first comparison.
ENDLESS = [
    f"{CASES}assert all(map(lambda c: f(c[0]) == c[1], cases))",
    f"{CASES}for got, want in zip(map(f, [1, 3]), [2, 4]): assert got == want",
    "assert all(x == 2 for x in list(map(f, [1])) or [2])",
    "for x in iter(lambda: f(1), 0): assert x == 2",
    "import itertools\nassert all(x == 2 for x in itertools.starmap(f, [(1,)]))",
    "import itertools\nassert all(itertools.takewhile(lambda x: True, map(lambda x: f(x) == x + 1, [1])))",
    "assert not [x for x in filter(lambda x: f(x) != x + 1, [1])]",
    "o = f\nassert all(map(lambda a: getattr(o, a)(1) == 2, ['method']))",
]
DECEIVING = {
    "a call": "def f(x): raise StopIteration\nf.method = f",
    "a call, of a subclass": "class S(StopIteration): pass\nS.__name__ = 'StopIteration'\ndef f(x): raise S\nf.method = f",
    "an asynchronous end": "def f(x): raise StopAsyncIteration\nf.method = f",
    "the end of a generator": "def f(x): raise GeneratorExit\nf.method = f",
    "the end of the program": "def f(x): raise SystemExit(0)\nf.method = f",
    "an interrupt": "def f(x): raise KeyboardInterrupt\nf.method = f",
    "a reply of its own": """
import os, sys
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'["raised", "StopIteration", ""]\\n' * 50)
        except OSError: pass
    raise StopIteration
f.method = f
""",
    "any operation": """
class F:
    def __call__(self, x): return F()
    def _end(self, *a): raise StopIteration
    __eq__ = __getitem__ = __len__ = __iter__ = __contains__ = __str__ = __repr__ = __bool__ = method = _end
    __hash__ = object.__hash__
f = F()
""",
}


@pytest.fixture(scope="module")
def code() -> RewardFunction:
    return resolve(RewardFunctionConfig(name="code", args={"partial": True, "timeout_s": 60.0}))


def score(code: RewardFunction, program: str, tests: list[str]) -> RewardScore:
    (result,) = call_reward(code, ScoreInputs(["p"], [f"```python\n{program}\n```"], [[1]], {"tests": [tests]}))
    return result


@pytest.mark.parametrize("name", DECEIVING)
def test_no_exception_of_a_program_ends_a_test_early(code: RewardFunction, name: str) -> None:
    result = score(code, DECEIVING[name], ENDLESS)
    assert (result.status, result.value) == (ScoreStatus.OK, 0.0), result.detail


def test_a_right_function_passes_the_tests_that_could_end_early(code: RewardFunction) -> None:
    tests = [t for t in ENDLESS if "iter(lambda" not in t]
    result = score(code, "def f(x): return x + 1\nf.method = f", tests)
    assert (result.value, result.detail) == (1.0, "")


RIGHT: list[tuple[str, str]] = [
    ("def f(n):\n    yield from range(n)", "g = f(2)\nassert next(g) == 0 and next(g) == 1 and next(g, 'end') == 'end'"),
    (
        "class C:\n    def __init__(self): self.n = 0\n    def __iter__(self): return self\n"
        "    def __next__(self):\n        self.n += 1\n        if self.n > 3: raise StopIteration\n        return self.n",
        "assert list(C()) == [1, 2, 3] and [a for a, b in zip(C(), C())] == [1, 2, 3]",
    ),
    ("class L:\n    def __getitem__(self, i): return [5, 6][i]\n    def __len__(self): return 2", "assert list(L()) == [5, 6]"),
    (
        "class L:\n    def __reversed__(self): return iter([2, 1])\n    def __iter__(self): return iter([1, 2])",
        "assert list(reversed(L())) == [2, 1]",
    ),
    ("class N:\n    def __init__(self): self.v = 1", "n = N()\nassert n and not hasattr(n, 'w') and getattr(n, 'w', 3) == 3"),
    ("class N:\n    def __bool__(self): return False", "assert not N()"),
    (
        "def pop(xs): return xs.pop()",
        "try:\n    pop([])\nexcept IndexError: pass\nelse: raise AssertionError",
    ),
    (
        "def get(d, k): return d[k]",
        "try:\n    get({}, 1)\nexcept KeyError: pass\nelse: raise AssertionError",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("program", "test"), RIGHT)
def test_protocols_that_end_by_an_exception_work(code: RewardFunction, program: str, test: str) -> None:
    result = score(code, program, [test])
    assert (result.value, result.detail) == (1.0, "")


EQUAL: list[tuple[str, str]] = [
    ("class A(bytes):\n    def __eq__(self, o): return True\ndef f(x): return A(b'')", "assert f(1) == b'abc'"),
    ("class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A()", "assert f(1) == [1, 2]"),
    ("class A(dict):\n    def __eq__(self, o): return True\ndef f(x): return [A()]", "assert f(1) == [{1: 2}]"),
    ("class A(float):\n    def __eq__(self, o): return True\n    def __sub__(self, o): return 0.0\ndef f(x): return A(9)",
     "assert abs(f(1) - 2.5) < 1e-6 or f(1) == 2.5"),
    ("class A(str):\n    def __eq__(self, o): return True\ndef f(x): return (A('a'),)", "assert f(1) == ('b',)"),
    ("class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\ndef f(x): return A()",
     "assert f(1) == 5 or not f(1) != 5"),
    ("class A:\n    __array_interface__ = {'shape': (1,), 'typestr': '<f8', 'data': b'\\0' * 8, 'version': 3}\n"
     "def f(x): return A()", "import struct\nassert f(1).__array_interface__['shape'] == (1,)"),
    ("import builtins\nbuiltins.isinstance = lambda *a: True\nbuiltins.set = list\ndef f(x): return 1", "assert f(1) == {1}"),
]  # fmt: skip


@pytest.mark.parametrize(("program", "test"), EQUAL)
def test_nothing_is_equal_by_its_own_word(code: RewardFunction, program: str, test: str) -> None:
    result = score(code, program, [test])
    assert (result.status, result.value) == (ScoreStatus.OK, 0.0), result.detail


def test_a_program_that_lacks_what_is_imported_is_wrong_and_no_error(code: RewardFunction) -> None:
    result = score(code, "def g(x): return x", ["from solution import f\nassert f(1) == 1"])
    assert (result.status, result.value) == (ScoreStatus.OK, 0.0)
    assert "cannot import name 'f'" in result.detail


@pytest.mark.parametrize("operation", ["call", "getattr", "getitem", "len", "bool", "iter", "str", "contains"])
def test_only_next_raises_the_end_of_an_iteration(operation: str) -> None:
    assert type(rebuilt("StopIteration", "", operation)) is ProgramError
    assert type(rebuilt("StopAsyncIteration", "", "next")) is ProgramError
    assert type(rebuilt("StopIteration", "", "next")) is StopIteration


def named(error: str) -> Any:
    return type(rebuilt(error, "x", "call"))


def test_other_exceptions_keep_their_type() -> None:
    assert [named(n) for n in ("IndexError", "KeyError", "AttributeError")] == [IndexError, KeyError, AttributeError]
    assert [named(n) for n in ("SystemExit", "KeyboardInterrupt", "GeneratorExit", "print", "Own")] == [
        ProgramError
    ] * 5
