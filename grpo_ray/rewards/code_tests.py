"""The tests of a row's programs, and whether a program passed them. Answers are compared here, out of every program's reach."""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import re
import symtable
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from grpo_ray import json_text
from grpo_ray.errors import RewardError

_FLOAT = re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
TOLERANCE = 1e-6
"""The relative and absolute tolerance if the right answer is written as a float."""
LONGER, SPARE_BYTES = 16, 4096
"""The bound (factor, bytes) on an answer's length relative to the right one; longer ones are not examined: splitting 16 MiB of new
lines takes a GiB."""
FORMS = "expected pairs [{input: .., output: ..}, ..], {inputs: [..], outputs: [..], fn_name: optional}, or Python with asserts"


@dataclass(frozen=True)
class Script:
    """A test by standard input -> standard output."""

    stdin: str
    expected: str


@dataclass(frozen=True)
class Call:
    """A test by arguments -> value of a function, or of a method of class Solution."""

    function: str
    args: list[Any]
    expected: Any


@dataclass(frozen=True)
class Asserts:
    """Tests in Python that fail by an exception, each with the names that it takes from the program."""

    tests: tuple[tuple[str, list[str]], ...]


def read_tests(tests: Any, entry_point: str | None) -> list[Script | Call] | Asserts:
    """The tests in the formats of data sets: pairs; APPS's and TACO's; MBPP's list of asserts; HumanEval's `check(candidate)`; also
    as JSON.

    Raises:
        RewardError: the format is none of these.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        with contextlib.suppress(ValueError):
            tests = json_text.read(tests)
    if isinstance(tests, dict) and {"inputs", "outputs"} <= tests.keys():
        function = tests.get("fn_name") or entry_point
        inputs, outputs = tests["inputs"], tests["outputs"]
        if len(inputs) == len(outputs) > 0:
            return [
                Call(function, list(i), o) if function else Script(_text(i), _text(o))
                for i, o in zip(inputs, outputs, strict=True)
            ]
    if isinstance(tests, str) and tests.strip():
        return Asserts((_checked(tests if entry_point is None else _with_check(tests, entry_point)),))
    if isinstance(tests, Sequence) and tests:
        if all(isinstance(t, str) for t in tests):
            return Asserts(tuple(_checked(t) for t in tests))
        if all(isinstance(t, dict) and {"input", "output"} <= t.keys() for t in tests):
            return [Script(_text(t["input"]), _text(t["output"])) for t in tests]
    raise RewardError(f"reward 'code': the column of tests holds {repr(tests)[:80]}; {FORMS}")


def _checked(test: str) -> tuple[str, list[str]]:
    try:
        return test, free_names(test)
    except (SyntaxError, ValueError) as e:
        raise RewardError(f"reward 'code': the tests {test[:80]!r} are no Python: {e}; {FORMS}") from None


@lru_cache(maxsize=4096)
def free_names(test: str) -> list[str]:
    """The names that only the program can supply: those that a test uses and neither defines nor finds among the builtins, which no
    program may replace (with an `all` that is always true).

    Raises:
        SyntaxError, ValueError: the test is no Python.
    """
    top = symtable.symtable(test, "tests", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (s.is_global() or table is top)}
        tables += table.get_children()
    return sorted(used - defined - set(dir(builtins)))


def _with_check(tests: str, entry_point: str) -> str:
    return f"{tests}\n\ncheck({entry_point})\n" if re.search(r"^def check\(", tests, re.MULTILINE) else tests


def _text(value: Any) -> str:
    """The text, which APPS sometimes stores as a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def same_output(output: bytes, expected: str) -> bool:
    """Whether outputs are equal line by line, ignoring white space at line ends and empty lines at the end; floats within
    TOLERANCE."""
    if _too_long(output, expected):
        return False
    got, right = _lines(output.decode(errors="replace")), _lines(expected)
    return len(got) == len(right) and all(
        a == b or _same_words(a.split(), b.split()) for a, b in zip(got, right, strict=True)
    )


def _too_long(output: bytes, expected: str) -> bool:
    return len(output) > LONGER * len(expected) + SPARE_BYTES


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")]


def _same_words(got: list[str], right: list[str]) -> bool:
    return len(got) == len(right) and all(
        a == b or bool(_FLOAT.fullmatch(b) and _NUMBER.fullmatch(a) and _close(float(a), float(b)))
        for a, b in zip(got, right, strict=True)
    )


def _close(a: float, b: float) -> bool:
    try:
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # An integer beyond all floats.
        return False


def same_value(output: bytes, expected: Any) -> bool:
    """Whether the JSON that a call returned equals the row's value; as in APPS, the row may hold the value in a list of one."""
    if _too_long(output, json.dumps(expected)):
        return False
    try:
        got = json.loads(output)
        return _same(got, expected) or (isinstance(expected, list) and len(expected) == 1 and _same(got, expected[0]))
    except (ValueError, RecursionError):
        return False


def _same(got: Any, right: Any) -> bool:
    if isinstance(right, list):
        return isinstance(got, list) and len(got) == len(right) and all(map(_same, got, right))
    if isinstance(right, dict):
        return isinstance(got, dict) and got.keys() == right.keys() and all(_same(got[k], right[k]) for k in right)
    if isinstance(right, float) and isinstance(got, int | float):
        return _close(got, right)
    return bool(got == right)
