"""The reward `code`: the program of an answer, the forms of its tests, and whose fault it is."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from actors.reward.process import ScoringProcess
from grpo_ray.config.reward import RewardConfig, RewardFunctionConfig
from grpo_ray.errors import ConfigError, RewardError
from grpo_ray.rewards.code import find_program
from grpo_ray.rewards.code_tests import free_names, read_tests, same_output, same_value
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.sandbox.box import Box, Outcome
from grpo_ray.types import RewardScore, ScoreStatus
from tests.bench.programs import TASKS, ordinary
from tests.bench.sandbox import score_ordinary
from tests.cpu_time import cpu_below

ADD = "def add(a, b):\n    return a + b\n"


def score(
    program: str, tests: Any, entry_point: str | None = None, language: str = "python", **args: Any
) -> RewardScore:
    function = resolve(RewardFunctionConfig(name="code", args={"timeout_s": 60.0, "language": language, **args}))
    columns = {"tests": [tests], "entry_point": [entry_point]}
    (result,) = call_reward(function, ScoreInputs(["p"], [f"```{language}\n{program}\n```"], [[1]], columns))
    return result


# ---- where the program is


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx\n```", "x\n"),
        (
            "First ```python\nold\n``` hm,\n```py\nold\n```\nbetter:\n```Python\nnew\n```\nIt prints\n```\n4\n```",
            "new\n",
        ),
        ("```\nx\n```", "x\n"),
        ("```\nx\n```\nthen\n```\ny\n```", "y\n"),
        ("<think>```python\ndraft\n```</think> no program", None),
        ("<think>```python\ndraft\n```</think>```python\nx\n```", "x\n"),
        ("```python\nx\n```<answer>print(4)</answer>", "print(4)"),
        ("<answer>```python\nx\n```</answer>\n```python\ny\n```", "x\n"),
        ("```python\ncut off", None),
        ("print(4)", None),
        ("", None),
        ("  ```python\n  x\n  ```", "  x\n"),
        ('```python title="a.py"\nx\n```', "x\n"),
    ],
)
def test_the_program_is_the_last_block_of_the_answer(text: str, program: str | None) -> None:
    assert find_program(text, ("python", "py", "python3")) == program


def test_an_answer_without_a_program_is_wrong_without_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    async def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a sandbox was started")

    function = resolve(RewardFunctionConfig(name="code"))
    monkeypatch.setattr(Box, "start", start)
    results = call_reward(
        function, ScoreInputs(["p"] * 50, ["I don't know."] * 50, [[1]] * 50, {"tests": [["assert f()"]] * 50})
    )
    assert {(r.status, r.value, r.detail) for r in results} == {
        (ScoreStatus.OK, 0.0, "no fenced block of python in the answer")
    }


# ---- comparing


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"1 2\n", "1 2", True),
        (b"1 2  \r\n\n\n", "1 2", True),
        (b"1  2", "1 2", True),
        (b"1\n2", "1 2", False),
        (b"\n1", "1", False),
        (b"0.333333349", "0.3333333333", True),
        (b"0.34", "0.3333333333", False),
        (b"1", "1.0", True),
        (b"1.0", "1", False),
        (b"123456789012345678", "123456789012345679", False),
        (b"1e-7", "0.0", True),
        (b"-1e-7", "0.0", True),
        (b"0", "0.0000001", True),
        (b"1e-5", "0.0", False),
        (b"0.00001", "0.00002", False),
        (b"2000000.5", "2000001.5", True),
        (b"2000001.5", "2000005.5", False),
        (b"nan", "1.5", False),
        (b"inf", "1.5", False),
        (b"YES", "Yes", False),
        (b"", "", True),
        (b"\xff", "?", False),
    ],
)
def test_outputs_are_compared_line_by_line(output: bytes, expected: str, same: bool) -> None:
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        (b"[1, [2, 3]]", [1, [2, 3]], True),
        (b"3", [3], True),
        (b"[3]", 3, False),
        (b"0.30000000000000004", 0.3, True),
        (b"1e-7", 0.0, True),
        (b"0", 1e-7, True),
        (b"1e-5", 0.0, False),
        (b"[-0.0, 5e-7]", [0.0, 0.0], True),
        (b'"3"', 3, False),
        (b'{"a": [0.1]}', {"a": [0.1]}, True),
        (b'{"a": 1, "b": 2}', {"a": 1}, False),
        (b"NaN", 0.5, False),
        (b"", None, False),
        (b"null", None, True),
        (b"[" * 100_000, [], False),
        (b"9" * 10_000, 9, False),
    ],
)
def test_values_are_compared_as_json(output: bytes, expected: Any, same: bool) -> None:
    assert same_value(output, expected) is same


def test_hostile_text_takes_no_time_to_read() -> None:
    texts = [
        "x```a\n" * 50_000,
        "<answer>" * 50_000,
        "</answer>" + "<answer>" * 50_000,
        "```\n" * 50_001,
        "`" * 300_000,
    ]
    outputs = [b"\n" * (16 << 20), b"1" * 200_000 + b"x", b"1." * 100_000, b"[]," * 1_000_000, b"{" * 1_000_000]
    with cpu_below(30):  # what goes back over the text again and again takes minutes
        for text in texts:
            find_program(text, ("python",))
        for output in outputs:
            assert not same_output(output, "1.5 " * 20_000)
            assert not same_value(output, [1.5] * 20_000)


def test_only_what_nobody_else_defines_is_taken_from_the_program() -> None:
    test = "import math\nlimit = 3\ndef check(candidate):\n    xs = [candidate(i) for i in range(limit)]\n"
    test += "    assert all(math.isclose(x, len(xs)) for x in xs) and helper(limit)\ncheck(add)\n"
    assert free_names(test) == ["add", "helper"]


# ---- the forms of tests


RIGHT = [
    ("a, b = map(int, input().split())\nprint(a + b)", [{"input": "1 2", "output": "3"}, {"input": "5 6", "output": "11"}], None),
    ("print(sum(map(int, open(0).read().split())))", {"inputs": ["1 2", "3\n4"], "outputs": ["3", "7"]}, None),
    ("import sys\nprint(sys.stdin.readline().strip())\nexit()", {"inputs": [["one", "two"]], "outputs": [["one"]]}, None),
    (ADD, '{"inputs": [[1, 2], [3, 4]], "outputs": [3, [7]], "fn_name": "add"}', None),
    ("class Solution:\n    def add(self, a, b): return a + b", {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}, None),
    (ADD, ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"], None),
    (ADD, "def check(candidate):\n    for i in range(9):\n        assert candidate(i, 1) == i + 1", "add"),
    (ADD, "from solution import add\ndef test_add():\n    assert add([1], (2,) and [2]) == [1, 2]", None),
    ("def f(x): return {1: (2, {3}), 'b': b'x', None: 1j}", ["assert f(0) == {1: (2, {3}), 'b': b'x', None: 1j}"], None),
    ("def f(x): x.sort()", ["xs = [3, 1, 2]\nassert f(xs) is None and xs == [1, 2, 3]"], None),
    ("def f(n):\n    yield from range(n)", ["assert list(f(3)) == [0, 1, 2]\nassert sum(f(5)) == 10"], None),
    ("class Stack(list):\n    def top(self): return self[-1]", ["assert Stack([1, 2]) == [1, 2]"], None),
    (
        "class Node:\n    def __init__(self, v): self.v, self.next = v, None\n"
        "def last(n):\n    while n.next: n = n.next\n    return n",
        ["a, b = Node(1), Node(2)\na.next = b\nassert last(a).v == 2 and last(a) is not a and a.v == 1"],
        None,
    ),
    (
        "def f(x):\n    raise ValueError(x)",
        ["try:\n    f('no')\nexcept ValueError as e:\n    assert str(e) == 'no'\nelse:\n    assert False"],
        None,
    ),
    ("import math\ndef f(x): return 2 ** x", ["assert math.log2(f(9)) == 9 and f(20000) == 1 << 20000"], None),
]  # fmt: skip


@pytest.mark.parametrize(("program", "tests", "entry_point"), RIGHT)
def test_a_right_program_passes_every_form_of_tests(program: str, tests: Any, entry_point: str | None) -> None:
    result = score(program, tests, entry_point)
    assert (result.status, result.value, result.detail) == (ScoreStatus.OK, 1.0, "")


@pytest.mark.parametrize("tests", [[{"input": "1", "output": "1"}, {"input": "2", "output": "3"}, {"input": "3", "output": "3"}],
                                   {"inputs": [[1], [2], [3]], "outputs": [1, 3, 3], "fn_name": "f"},
                                   ["assert f(1) == 1", "assert f(2) == 3", "assert f(3) == 3"]])  # fmt: skip
def test_part_of_the_tests_counts_only_when_asked_for(tests: Any) -> None:
    program = "def f(x): return x\nif __name__ == '__main__':\n    import sys\n    print(*sys.stdin)"
    assert score(program, tests).value == 0.0
    result = score(program, tests, partial=True)
    assert result.value == pytest.approx(2 / 3)
    assert result.detail


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        (5, "expected pairs"),
        ([], "expected pairs"),
        ({"inputs": [1], "outputs": []}, "expected pairs"),
        (["assert add(1, 2 == 3"], "no Python"),
        (["assert add(lambda: 1, 2) == 3"], "only plain data"),
        (["import a_module_that_is_not_there\nassert add(1, 2) == 3"], "a_module_that_is_not_there"),
        (
            ["import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(add(1, 2), 4)"],
            "without calling",
        ),
    ],
)
def test_tests_that_cannot_be_run_are_an_error_of_the_row(tests: Any, words: str) -> None:
    result = score(ADD, tests)
    assert result.status is ScoreStatus.ERROR
    assert words in result.detail


def test_other_languages_by_recipe() -> None:
    tests = [{"input": "20 22", "output": "42"}]
    assert (
        score('read a b; echo "$((a + b))"', tests, language="sh", command=["sh", "{file}"], file="p.sh").value == 1.0
    )
    assert score('read a b; echo "$a"', tests, language="sh", command=["sh", "{file}"], file="p.sh").value == 0.0
    cpp: dict[str, Any] = {
        "language": "cpp",
        "compile": ["g++", "-o", "p", "{file}"],
        "command": ["./p"],
        "file": "p.cpp",
        "cpu_s": 30,
    }
    program = "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }"
    result = score(program, tests, **cpp)
    assert (result.value, result.detail) == (1.0, "")
    assert "it does not compile: exit code 1" in score("int main() { return x; }", tests, **cpp).detail


def test_modules_are_there_when_they_are_shown(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def double(x): return 2 * x")
    program, tests = "import helper\nprint(helper.double(int(input())))", [{"input": "4", "output": "8"}]
    assert "ModuleNotFoundError" in score(program, tests).detail
    tmp_path.chmod(0o755)
    assert score(program, tests, python_path=[str(tmp_path)]).value == 1.0
    if os.geteuid() == 0:
        tmp_path.chmod(0o700)
        with pytest.raises(RewardError, match="is root's alone"):
            score(program, tests, python_path=[str(tmp_path)])


# ---- whose fault it is


def test_a_sandbox_that_fails_is_an_error_and_never_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    function = resolve(RewardFunctionConfig(name="code"))
    monkeypatch.setattr("grpo_ray.sandbox.box.interpreter", lambda: "/no/such/python")
    (result,) = call_reward(
        function, ScoreInputs(["p"], [f"```\n{ADD}```"], [[1]], {"tests": [["assert add(1, 2) == 3"]]})
    )
    assert result.status is ScoreStatus.ERROR
    assert "no sandbox can be started: bwrap: execvp /no/such/python" in result.detail


def test_a_program_that_loops_is_wrong_and_the_scorer_lives_on() -> None:
    args = {"timeout_s": 1.5, "cpu_s": 1}
    config = RewardConfig(functions=(RewardFunctionConfig(name="code", args=args),), timeout_s=60)
    process = ScoringProcess(config)
    process.start()
    try:
        pid = process.pid
        for program, value in (("while True: pass", 0.0), ("import time; time.sleep(99)", 0.0), ("print(1)", 1.0)):
            inputs = ScoreInputs(["p"], [f"```\n{program}\n```"], [[1]], {"tests": [[{"input": "", "output": "1"}]]})
            ((result,),) = process.run([(0, inputs)])
            assert (result.status, result.value, bool(result.detail)) == (ScoreStatus.OK, value, value == 0)
        assert process.pid == pid
    finally:
        process.kill()


def test_a_program_has_its_processor_time_for_each_test_and_no_more() -> None:
    burn = "import time\nlimit = float(input())\nwhile time.process_time() < limit: pass\nprint(1)"
    tests = [{"input": "0.6", "output": "1"}] * 3
    assert score(burn, tests, cpu_s=1).value == 1.0
    result = score(burn, [*tests, {"input": "60", "output": "1"}], cpu_s=1)
    assert (result.value, result.detail) == (0.0, "test 4 of 4: out of CPU time")


@pytest.mark.parametrize("form", ["scripts", "asserts"])
def test_the_time_of_a_program_is_for_all_of_its_tests_together(form: str) -> None:
    """Each has a fraction of it; a slower machine only makes them longer."""
    program = "import time\ntime.sleep(0.3)\nprint(1)\ndef f():\n    time.sleep(0.3)\n    return 1"
    tests: Any = [{"input": "", "output": "1"}] * 9 if form == "scripts" else ["assert f() == 1"] * 9
    result = score(program, tests, timeout_s=1.0)
    assert result.value == 0.0
    assert "out of time" in result.detail


def test_one_test_leaves_no_process_to_the_next() -> None:
    program = "import os, time\nprint(len([p for p in os.listdir('/proc') if p.isdigit()]), flush=True)\n"
    program += "if os.fork() == 0:\n    os.setsid()\n    time.sleep(600)"
    assert score(program, [{"input": "", "output": "2"}] * 3).value == 1.0


def test_a_group_is_scored_several_at_once_each_by_its_own_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    run, under_way, most = Box.script, 0, 0

    async def counted(self: Box, stdin: bytes) -> Outcome:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await run(self, stdin)
        finally:
            under_way -= 1

    monkeypatch.setattr(Box, "script", counted)
    function = resolve(RewardFunctionConfig(name="code", args={"timeout_s": 60.0, "concurrency": 3}))
    completions = [f"```\nimport time\ntime.sleep(3)\nprint({i})\n```" for i in range(4)]
    tests = [[{"input": "", "output": str(i if i != 2 else 9)}] for i in range(4)]
    results = call_reward(function, ScoreInputs(["p"] * 4, completions, [[1]] * 4, {"tests": tests}))
    assert [r.value for r in results] == [1.0, 1.0, 0.0, 1.0]
    assert 1 < most <= 3


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"command": ["no-such-language", "{file}"]}, "'no-such-language' is not in"),
        ({"read_only": ["/no/such/folder"]}, "/no/such/folder"),
        ({"timeouts": 3}, "timeout_s"),
    ],
)
def test_what_is_missing_is_said_before_the_run(args: dict[str, Any], words: str) -> None:
    with pytest.raises(RewardError, match=words):
        resolve(RewardFunctionConfig(name="code", args=args))


def test_the_scorer_gives_a_program_its_whole_time() -> None:
    with pytest.raises((ConfigError, ValueError), match="keep the second above the first"):
        RewardConfig(functions=(RewardFunctionConfig(name="code"),), timeout_s=8)


# ---- ordinary programs


def test_ordinary_programs_get_their_right_scores() -> None:
    code = resolve(RewardFunctionConfig(name="code", args={"timeout_s": 60.0}))
    indices = range(3 * len(TASKS))
    assert [trouble for i in indices if (trouble := score_ordinary(code, i))] == []
    assert 0.3 < sum(ordinary(i).value for i in indices) / len(indices) < 0.7


@pytest.mark.slow
def test_two_thousand_ordinary_programs_get_their_right_scores() -> None:
    code = resolve(RewardFunctionConfig(name="code", args={"timeout_s": 60.0}))
    assert [trouble for i in range(100, 2100) if (trouble := score_ordinary(code, i))] == []


def test_tests_in_json_read_as_tests() -> None:
    assert read_tests('[{"input": "1", "output": "2"}]', None) == read_tests([{"input": "1", "output": "2"}], None)
    assert asyncio.iscoroutinefunction(resolve(RewardFunctionConfig(name="code")).call)
