"""Ordinary programs, right ones and wrong ones, with tests whose answers are computed here."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

TESTS_EACH = 3


@dataclass(frozen=True)
class Task:
    """`source` has «|PIECE» in it: the piece makes a right program a wrong one."""

    source: str
    draw: Callable[[random.Random], tuple[Any, ...]]
    """Arguments of f."""
    solve: Callable[..., Any]


@dataclass(frozen=True)
class Ordinary:
    """One row, one completion, and what it is worth."""

    completion: str
    tests: Any
    value: float


def _numbers(low: int = -50, high: int = 50, least: int = 3) -> Callable[[random.Random], tuple[Any, ...]]:
    return lambda r: ([r.randint(low, high) for _ in range(r.randint(least, 12))],)


def _words(r: random.Random) -> tuple[str]:
    return (" ".join("".join(r.choices("abcde", k=r.randint(2, 5))) for _ in range(r.randint(3, 8))),)


def _primes(n: int) -> int:
    return sum(all(k % d for d in range(2, math.isqrt(k) + 1)) for k in range(2, n + 1))


def _edits(a: str, b: str) -> int:
    @cache
    def go(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(go(i - 1, j) + 1, go(i, j - 1) + 1, go(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return go(len(a), len(b))


def _rising(xs: list[int]) -> int:
    return max(
        n
        for n in range(len(xs) + 1)
        for c in itertools.combinations(xs, n)
        if all(a < b for a, b in itertools.pairwise(c))
    )


TASKS = (
    Task("def f(xs): return sum(xs)«|+ 1»", _numbers(), sum),
    Task("def f(xs):\n    xs = sorted(xs)\n    return xs[-1] - xs[0]«|+ 1»", _numbers(0, 999), lambda xs: max(xs) - min(xs)),
    Task("import math\ndef f(a, b): return math.gcd(a, b)«|+ 1»", lambda r: (r.randint(2, 500), r.randint(2, 500)), math.gcd),
    Task(
        "def f(n):\n    a, b = 0, 1\n    for _ in range(n«|+1»): a, b = b, a + b\n    return a",
        lambda r: (r.randint(2, 90),),
        lambda n: _fibonacci(n),
    ),
    Task(
        "def f(n):\n    s = bytearray([1]) * (n + 1)\n    s[:2] = b'\\0\\0'\n    for i in range(2, int(n ** .5) + 1):\n"
        "        if s[i]: s[i*i::i] = bytes(len(s[i*i::i]))\n    return sum(s)«| + 1»",
        lambda r: (r.randint(10, 900),),
        _primes,
    ),
    Task("def f(s): return s[::-1]«|+ s»", _words, lambda s: "".join(reversed(s))),
    Task(
        "from collections import Counter\ndef f(s):\n    c = Counter(s.split())\n    return max(c.values())«|+ 1»",
        _words,
        lambda s: max(s.split().count(w) for w in s.split()),
    ),
    Task("def f(s): return len(set(s.split()))«|+ 1»", _words, lambda s: len(dict.fromkeys(s.split()))),
    Task(
        "from functools import lru_cache\ndef f(a, b):\n    @lru_cache(None)\n"
        "    def d(i, j):\n        if not i or not j: return i + j\n"
        "        return min(d(i-1, j) + 1, d(i, j-1) + 1, d(i-1, j-1) + (a[i-1] != b[j-1]))\n    return d(len(a), len(b))«|- 1»",
        lambda r: ("".join(r.choices("abc", k=8)), "".join(r.choices("abc", k=9))),
        _edits,
    ),
    Task(
        "import bisect\ndef f(xs):\n    t = []\n    for x in xs:\n        i = bisect.bisect_left(t, x)\n        t[i:i+1] = [x]\n"
        "    return len(t)«|+ 1»",
        _numbers(0, 30),
        _rising,
    ),
    Task("def f(xs): return sorted(xs)«|+ [0]»", _numbers(), lambda xs: sorted(xs)),
    Task(
        "import heapq\ndef f(xs):\n    heapq.heapify(xs)\n    total = 0\n    while len(xs) > 1:\n"
        "        a = heapq.heappop(xs) + heapq.heappop(xs)\n"
        "        total += a\n        heapq.heappush(xs, a)\n    return total«|+1»",
        _numbers(1, 40),
        lambda xs: _huffman(sorted(xs)),
    ),
    Task("def f(n, b):\n    d = ''\n    while n:\n        d = str(n % b) + d\n        n //= b\n    return d«| + '0'»",
         lambda r: (r.randint(5, 9999), r.randint(2, 9)), lambda n, b: _digits(n, b)),
    Task("def f(xs): return sum(xs) / len(xs)«|+ 0.01»", _numbers(), lambda xs: math.fsum(xs) / len(xs)),
    Task(
        "class Account:\n    def __init__(self): self.held = 0\n    def pay(self, x): self.held = max(0, self.held + x)\n"
        "def f(xs):\n    a = Account()\n    for x in xs: a.pay(x)\n    return a.held«|+ 2»",
        _numbers(),
        lambda xs: _held(xs),
    ),
    Task("import re\ndef f(s): return len(re.findall(r'[aeiou]+', s))«|+ 1»", _words,
         lambda s: sum(c in "aeiou" and (i == 0 or s[i - 1] not in "aeiou") for i, c in enumerate(s))),
    Task("def f(a, b, m): return pow(a, b, m)«|+ 1»",
         lambda r: (r.randint(2, 99), r.randint(2, 60), r.randint(2, 999)), lambda a, b, m: a**b % m),
    Task(
        "from itertools import accumulate\ndef f(xs): return list(accumulate(xs))«|+ xs»",
        _numbers(),
        lambda xs: [sum(xs[: i + 1]) for i in range(len(xs))],
    ),
)  # fmt: skip


def _fibonacci(n: int) -> int:
    return sum(math.comb(n - 1 - k, k) for k in range((n + 1) // 2))


def _huffman(xs: list[int]) -> int:
    if len(xs) < 2:
        return 0
    first = xs[0] + xs[1]
    return first + _huffman(sorted([first, *xs[2:]]))


def _digits(n: int, base: int) -> str:
    return (_digits(n // base, base) if n >= base else "") + str(n % base)


def _held(xs: list[int]) -> int:
    sums = [0, *itertools.accumulate(xs)]
    return sums[-1] - min(sums)


def ordinary(index: int) -> Ordinary:
    """The same one for the same index. Half of them are right; pairs, calls and asserts take turns."""
    r = random.Random(index)
    task = TASKS[index % len(TASKS)]
    right = r.random() < 0.5
    source = _choose(task.source, right)
    drawn = [task.draw(r) for _ in range(TESTS_EACH)]
    answers = [task.solve(*args) for args in drawn]
    match index // len(TASKS) % 3:
        case 0:
            source += "\nimport ast\nprint(f(*ast.literal_eval(input())))"
            tests: Any = [{"input": f"{args!r}\n", "output": f"{a}\n"} for args, a in zip(drawn, answers, strict=True)]
        case 1:
            tests = {"inputs": [list(args) for args in drawn], "outputs": answers, "fn_name": "f"}
        case _:
            tests = [f"assert abs(f(*{args!r}) - {a!r}) < 1e-9" if isinstance(a, float) else f"assert f(*{args!r}) == {a!r}"
                     for args, a in zip(drawn, answers, strict=True)]  # fmt: skip
    return Ordinary(f"<think>Easy.</think>\n```python\n{source}\n```\n", tests, float(right))


def _choose(source: str, right: bool) -> str:
    head, piece, tail = re.split("[«»]", source)
    return head + ("" if right else piece[1:]) + tail
