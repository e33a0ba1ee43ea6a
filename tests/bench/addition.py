"""The tasks of `make bench-versus`: addition with its working, one token a character, in answers of two kinds of length.

`even`: two numbers of three digits, column by column from the units up, every answer 62 or 63 tokens with its end. The tags are
in square brackets because the tiny tokenizer has R1's as one token each, and half of this answer are tags.

    Prompt      Q: 537+248=
    Completion  [think]7+8+0=15,3+4+1=08,5+2+0=07[/think][answer]785[/answer]

`heavy`: the same term added n times to a number of three digits, modulo 1000, with what is left to do in front of each sum.

    Prompt      Q: 341+7*03=
    Completion  <think>03:348,02:355,01:362</think><answer>362</answer>

n is 2 to 71, drawn log-normally, as the lengths of real reasoning are; an answer has 7 n + 7 tokens with its end: 21 to 504, the
median 56, the mean 80, one in ten above 168, one in a hundred above 350.

Demonstrations have deliberate flaws, so that a model that imitates them is right now and then and has something left to learn.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

NUM_DEMONSTRATIONS, NUM_HELD_OUT, NUM_TRAIN = 20_000, 512, 4_096
MEDIAN_TERMS, SIGMA, MOST_TERMS = 6.0, 0.95, 71
FORMAT = re.compile(
    r"<think>[^<>]*</think><answer>(\d+)</answer>|\[think\][^\[\]]*\[/think\]\[answer\](\d+)\[/answer\]"
)

Problem = tuple[int, ...]
Part = Literal["train", "held_out"]


@dataclass(frozen=True)
class Flaws:
    """How often a demonstration goes wrong, each a probability."""

    wrong: float = 0.0
    """A sum is random. Per sum."""
    forgotten_carry: float = 0.0
    """Per carry."""
    broken_format: float = 0.0
    """A tag is missing. Per demonstration."""


@dataclass(frozen=True)
class Task:
    draw: Callable[[random.Random], Problem]
    prompt: Callable[[Problem], str]
    work: Callable[[Problem, Flaws, random.Random], tuple[str, str]]
    """The working and the answer."""
    answer: Callable[[Problem], str]
    tags: tuple[str, str]
    """What opens and closes one."""
    flaws: Flaws
    cold_start_steps: int
    """Of 32 demonstrations; after them a quarter to a third of the answers are right."""
    max_prompt_length: int
    max_completion_length: int
    context: int

    def demonstrate(self, problem: Problem, flaws: Flaws, rng: random.Random) -> str:
        working, answer = self.work(problem, flaws, rng)
        left, right = self.tags
        tags = [f"{left}{name}{right}" for name in ("think", "/think", "answer", "/answer")]
        if rng.random() < flaws.broken_format:
            tags[rng.randrange(4)] = ""
        return f"{tags[0]}{working}{tags[1]}{tags[2]}{answer}{tags[3]}"


def _draw_columns(rng: random.Random) -> Problem:
    return rng.randrange(100, 1000), rng.randrange(100, 1000)


def _work_columns(problem: Problem, flaws: Flaws, rng: random.Random) -> tuple[str, str]:
    columns, digits, carry = [], "", 0
    for a, b in zip(str(problem[0])[::-1], str(problem[1])[::-1], strict=True):
        total = int(a) + int(b) + carry
        if carry and rng.random() < flaws.forgotten_carry:
            total -= carry
        if rng.random() < flaws.wrong:
            total = rng.randrange(20)
        columns.append(f"{a}+{b}+{carry}={total:02d}")
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
    return ",".join(columns), f"{carry or ''}{digits}"


def _draw_terms(rng: random.Random) -> Problem:
    while not 2 <= (n := round(MEDIAN_TERMS * rng.lognormvariate(0, SIGMA))) <= MOST_TERMS:
        pass
    return rng.randrange(1000), rng.randrange(1, 10), n


def _work_terms(problem: Problem, flaws: Flaws, rng: random.Random) -> tuple[str, str]:
    total, term, n = problem
    steps = []
    for left in range(n, 0, -1):
        carries = total % 10 + term > 9
        total = (total + term) % 1000
        if carries and rng.random() < flaws.forgotten_carry:
            total = (total - 10) % 1000
        if rng.random() < flaws.wrong:
            total = rng.randrange(1000)
        steps.append(f"{left:02d}:{total:03d}")
    return ",".join(steps), f"{total:03d}"


TASKS = {
    "even": Task(
        draw=_draw_columns,
        prompt=lambda p: f"Q: {p[0]}+{p[1]}=",
        work=_work_columns,
        answer=lambda p: str(p[0] + p[1]),
        tags=("[", "]"),
        # Above a half, forgetting the carry is a habit: the likeliest continuation, wrong wherever there is one.
        flaws=Flaws(wrong=0.08, forgotten_carry=0.65, broken_format=0.08),
        cold_start_steps=400,
        max_prompt_length=16,
        max_completion_length=72,
        context=256,
    ),
    "heavy": Task(
        draw=_draw_terms,
        prompt=lambda p: f"Q: {p[0]:03d}+{p[1]}*{p[2]:02d}=",
        work=_work_terms,
        answer=lambda p: f"{(p[0] + p[1] * p[2]) % 1000:03d}",
        tags=("<", ">"),
        # A missing tag is the habit here. With one carry in ten forgotten instead, 50 steps of RL went from 14 to 23% right.
        flaws=Flaws(wrong=0.002, forgotten_carry=0.02, broken_format=0.65),
        cold_start_steps=1000,
        max_prompt_length=16,
        max_completion_length=512,
        context=640,
    ),
}


def demonstrations(task: str, seed: int = 1) -> Iterator[dict[str, str]]:
    """Rows {prompt, completion}, with the task's flaws."""
    t, rng = TASKS[task], random.Random(seed + 1)
    for problem in _problems(t, seed)[:NUM_DEMONSTRATIONS]:
        yield {"prompt": t.prompt(problem), "completion": t.demonstrate(problem, t.flaws, rng)}


def rows(task: str, part: Part, seed: int = 1) -> list[dict[str, str]]:
    """Rows {prompt, answer}; none of them is in another part, or demonstrated."""
    t, start = TASKS[task], NUM_DEMONSTRATIONS
    cut = slice(start, start + NUM_HELD_OUT) if part == "held_out" else slice(start + NUM_HELD_OUT, None)
    return [{"prompt": t.prompt(p), "answer": t.answer(p)} for p in _problems(t, seed)[cut]]


def right_completions(task: str, seed: int = 1) -> list[str]:
    """Of the train rows, without a flaw: the lengths of a step that can be known before it."""
    t = TASKS[task]
    train = _problems(t, seed)[NUM_DEMONSTRATIONS + NUM_HELD_OUT :]
    return [t.demonstrate(p, Flaws(), random.Random(0)) for p in train]


def _problems(task: Task, seed: int) -> list[Problem]:
    """Distinct ones in a seeded order: its slices are disjoint, and each has the same distribution."""
    rng = random.Random(seed)
    found: dict[Problem, None] = {}
    while len(found) < NUM_DEMONSTRATIONS + NUM_HELD_OUT + NUM_TRAIN:
        found[task.draw(rng)] = None
    return list(found)


def correct(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the whole completion is as it has to be and its answer is right."""
    return [float(given is not None and given == a) for given, a in zip(_answers(completions), answer, strict=True)]


def well_formed(completions: list[Any], **columns: Any) -> list[float]:
    """1 where the whole completion is as it has to be, the answer apart."""
    return [float(given is not None) for given in _answers(completions)]


def _answers(completions: list[Any]) -> list[str | None]:
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [(m[1] or m[2]) if (m := FORMAT.fullmatch(text)) else None for text in texts]
