"""The reward for a program that passes its tests."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
from collections.abc import Sequence
from typing import Any

from grpo_ray.config.reward import CODE_TIMEOUT_S
from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.code_tests import Asserts, Call, Script, read_tests, same_output, same_value
from grpo_ray.rewards.functions.function import Completions, Explained, text_of
from grpo_ray.sandbox.box import Box, BoxEnded, Limits, Outcome
from grpo_ray.sandbox.isolation import PATH, Languages
from grpo_ray.sandbox.trial import check_isolation

# The quantifier is possessive: without a line break after it, backtracking finds none either.
_FENCE = re.compile(r"```[ \t]*+([\w+#.-]*+)[^\n`]*+\n")
_END_OF_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
_OTHER_NAMES = {"python": ("py", "python3"), "javascript": ("js", "node"), "cpp": ("c++",), "rust": ("rs",)}
_SIGNALS = {-9: "killed", -11: "segmentation fault", -24: "out of CPU time", -25: "a file too large"}


async def code(
    completions: Completions,
    tests: list[Any],
    entry_point: list[str | None] | None = None,
    *,
    partial: bool = False,
    language: str = "python",
    command: Sequence[str] = (),
    compile: Sequence[str] = (),
    file: str = "program",
    read_only: Sequence[str] = (),
    python_path: Sequence[str] = (),
    timeout_s: float = CODE_TIMEOUT_S,
    cpu_s: int = Limits.cpu_s,
    memory_mb: int = Limits.memory_mb,
    processes: int = Limits.processes,
    file_mb: int = Limits.file_mb,
    disk_mb: int = Limits.disk_mb,
    concurrency: int = 1,
) -> list[Explained]:
    """1 if the completion's program passes all `tests` of its row, else 0; `partial`: the fraction of them that it passes.

    The program is the last fenced block of the answer (in `<answer>`, else after `</think>`), in `language` if one is marked
    so. Tests are pairs [{input, output}, ..] of standard input and output; {inputs, outputs, fn_name} as in APPS; or Python with
    asserts (MBPP's list, HumanEval's `check` with the column `entry_point`), which see the program's functions from another
    sandbox and can pass plain data to them. Names that such tests use and don't define are the program's, builtins and modules
    aside.

    A program that is wrong, crashes, loops, or attacks its sandbox scores 0, and the detail says why; a sandbox that can't be
    started is an error. `grpo_ray.sandbox` lists the limits. `timeout_s` is for all tests of a program together, `cpu_s`
    for each. Where `concurrency` sandboxes run at once (`reward.unit: group`), each needs a core to keep its time.

    Other languages, with pairs: `command: [node, "{file}"], file: program.js, language: javascript`; `compile: [g++, -O1, -o,
    program, "{file}"]` runs once before. Runtimes that reserve address space need more `memory_mb`. `read_only` are folders to be
    seen, `python_path` those with modules.

    Range {0, 1}; partial: [0, 1].

    Raises:
        RewardError: a sandbox can't be started, or the tests can't be read or used.
    """
    limits = Limits(timeout_s, cpu_s, memory_mb, processes, file_mb, disk_mb)
    languages = Languages(tuple(read_only), tuple(python_path))
    names = (language, *_OTHER_NAMES.get(language, ()))
    argv = [[part.replace("{file}", file) for part in parts] for parts in (compile, command)]
    turns = asyncio.Semaphore(concurrency)

    async def score(completion: Any, row: Any, name: str | None) -> Explained:
        wanted = read_tests(row, name)
        program = find_program(text_of(completion), names)
        if program is None:
            return Explained(0.0, f"no fenced block of {language} in the answer")
        async with turns:
            if isinstance(wanted, Asserts):
                if command:
                    raise RewardError("reward 'code': tests with assert are for Python; leave `command` out")
                return await _judge(program, wanted, limits, languages, partial)
            imports = ("json",) if isinstance(wanted[0], Call) else ()
            source_file = file if command else ""
            async with await Box.start(program, limits, languages, file=source_file, imports=imports) as box:
                return await _run(box, wanted, *argv, partial=partial)

    points = entry_point or [None] * len(completions)
    tasks = [asyncio.ensure_future(score(*row)) for row in zip(completions, tests, points, strict=True)]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_code(args: dict[str, Any]) -> None:
    """Check, before a run, that programs can be isolated here, and that their interpreters exist.

    Raises:
        RewardError: something is missing; names it.
    """
    languages = Languages(tuple(args.get("read_only", ())), tuple(args.get("python_path", ())))
    for option in ("command", "compile"):
        tool = next(iter(args.get(option, ())), None)
        if tool is not None and "/" not in tool and shutil.which(tool, path=PATH) is None:
            raise RewardError(
                f"reward 'code': {option} {tool!r} is not in {PATH}; install it, or name it by its full path"
            )
    try:
        asyncio.run(check_isolation(languages))
    except RewardError as e:
        raise RewardError(f"reward 'code': {e}") from None


def find_program(completion: str, names: Sequence[str]) -> str | None:
    """The last block in one of these languages, else the last block; everything in `<answer>` if it has no block."""
    text = completion.rpartition("</think>")[2]
    answer = answer_of(text)
    blocks, at = [], 0
    while (fence := _FENCE.search(answer, at)) and (end := _END_OF_FENCE.search(answer, fence.end())):
        blocks.append((fence[1], answer[fence.end() : end.start()]))
        at = end.end()
    own = [body for mark, body in blocks if mark.lower() in names]
    if own or blocks:
        return own[-1] if own else blocks[-1][1]
    return answer if "<answer>" in text and "</answer>" in text else None


async def _run(
    box: Box,
    tests: Sequence[Script | Call],
    compile: list[str],
    command: list[str],
    *,
    partial: bool,
) -> Explained:
    passed, why, i = 0, "", 0
    try:
        if compile:
            outcome = await box.command(compile, b"")
            if outcome.code != 0:
                return Explained(0.0, f"it does not compile: {_ended(outcome)}")
        for i, test in enumerate(tests):
            if isinstance(test, Call):
                outcome = await box.call(test.function, test.args)
                right = same_value(outcome.output, test.expected)
            else:
                stdin = test.stdin.encode("utf-8", "surrogatepass")
                outcome = await (box.command(command, stdin) if command else box.script(stdin))
                right = same_output(outcome.output, test.expected)
            if right and outcome.code == 0:
                passed += 1
                continue
            why = why or f"test {i + 1} of {len(tests)}: {_ended(outcome) or 'another answer'}"
            if not partial:
                break
    except (BoxEnded, TimeoutError) as e:
        why = why or f"test {i + 1} of {len(tests)}: {str(e) or 'out of time'}"
    return _value(passed, len(tests), why, partial)


async def _judge(program: str, wanted: Asserts, limits: Limits, languages: Languages, partial: bool) -> Explained:
    """The result of Python tests: the program serves in one sandbox; the tests, which it never sees, run in another."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        async with (
            await Box.start("", limits, languages, pass_fds=(ours.fileno(),)) as judge,
            await Box.start(program, limits, languages, pass_fds=(theirs.fileno(),)) as box,
        ):
            ends = ours.fileno(), theirs.fileno()
            ours.close()
            theirs.close()
            serving = asyncio.create_task(box.serve(ends[1]))
            try:
                outcome = await judge.judge(ends[0], wanted.tests, every=partial)
            except BoxEnded as e:
                return Explained(0.0, f"the tests' sandbox ended: {e}")
            except TimeoutError:
                return Explained(0.0, "out of time")
            finally:
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)
    if b"?" in outcome.output:
        raise RewardError(
            f"reward 'code': {wanted.tests[len(outcome.output) - 1][0][:80]!r} can't be run: {outcome.trouble}"
        )
    return _value(outcome.output.count(b"."), len(wanted.tests), _ended(outcome), partial)


def _value(passed: int, total: int, why: str, partial: bool) -> Explained:
    if passed == total:
        return Explained(1.0, "")
    return Explained(passed / total if partial else 0.0, why)


def _ended(outcome: Outcome) -> str:
    """How the process ended, if it failed."""
    if outcome.code == 0:
        return outcome.trouble
    plain = f"exit code {outcome.code}" if outcome.code > 0 else f"signal {-outcome.code}"
    return _SIGNALS.get(outcome.code, plain) + (f", {outcome.trouble}" if outcome.trouble else "")
