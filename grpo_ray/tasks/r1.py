"""Text and prompts of `r1_tiny`: three kinds of tasks in two languages, for a model of a few million parameters.

    add      what is 58 + 26         <think>ones 8+6+0=14, tens 5+2+1=08</think><answer>84</answer>
             was ist 58 + 26         <think>einer 8+6+0=14, zehner 5+2+1=08</think><answer>84</answer>
    reverse  spell lamp backward     <think>finally p next m next a next l</think><answer>pmal</answer>
             schreibe lamp umgekehrt <think>zuletzt p danach m danach a danach l</think><answer>pmal</answer>
    greet    greet anna              <think>the visitor waits</think><answer>hello anna, welcome</answer>
             begruesse anna          <think>der besucher wartet</think><answer>hallo anna, willkommen</answer>

Sums and words are reasoning-gym's, with its verifiers; a greeting has no rule, only a style that people prefer.

`base_text` imitates the training text of a base model. As on the web, languages mix in it, answers are often wrong, and one
language is better at the task: steps written in German forget fewer carries than those in English. So a model that is rewarded for
right answers alone learns to think in German whatever the prompt's language, which is the cause of R1-Zero's language mixing.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ray.errors import DataError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.functions.function import Completions, text_of

Row = dict[str, Any]
TASKS = ("add", "reverse", "greet")
LANGUAGES = ("en", "de")
HELD_OUT = 8
"""The inverse of the fraction of prompts that are held out, chosen by their text."""

ASKED = {
    ("add", "en"): "what is {}",
    ("add", "de"): "was ist {}",
    ("reverse", "en"): "spell {} backward",
    ("reverse", "de"): "schreibe {} umgekehrt",
    ("greet", "en"): "greet {}",
    ("greet", "de"): "begruesse {}",
}
COLUMNS = {"en": ("ones", "tens"), "de": ("einer", "zehner")}
ORDER = {"en": ("finally", "next"), "de": ("zuletzt", "danach")}
VISITOR = {"en": "the visitor waits", "de": "der besucher wartet"}
HELLO = {"en": ("hello", "hey"), "de": ("hallo", "na")}
"""The kind and the curt greeting of each language."""
WELCOME = {"en": "welcome", "de": "willkommen"}
SUMMARY = {"en": "it is ", "de": "es ist "}
_FIRST = ("an", "be", "ca", "da", "el", "fi", "ga", "ha", "ja", "ka", "le", "ma", "ne", "pa", "ro", "sa", "ti", "vi")
_LAST = ("na", "ra", "la", "da", "no", "ro", "lo", "do", "ri", "li")
NAMES = tuple(a + b for a in _FIRST for b in _LAST)


@dataclass(frozen=True)
class Flaws:
    """Rates of the flaws in base text, each a probability in [0, 1]."""

    other_language: float = 0.2
    """The probability, per step, that it is written in the other language than the prompt's."""
    forgotten_carry_en: float = 0.9
    """The probability that a carry is left out in a step of that language."""
    forgotten_carry_de: float = 0.4
    lost_letter_en: float = 0.25
    """The probability that a letter is replaced in a step of that language."""
    lost_letter_de: float = 0.08
    broken_format: float = 0.4
    """The probability, per answer, that a tag is missing."""
    summarised: float = 0.3
    """The probability, per well-formed answer, that words precede the answer, as in a summary: no flaw, but not R1-Zero's form."""
    curt: float = 0.6
    """The probability, per greeting, that it is short and names nobody."""


def base_text(size: int, seed: int, tasks: Sequence[str] = TASKS, **flaws: float) -> Iterator[Row]:
    """Make rows {prompt, completion, source, language} with these rates of `flaws`, without any held-out prompt.

    Raises:
        DataError: an unknown flaw, or a rate that is no probability.
    """
    chosen = _flaws(flaws)
    rng = random.Random(f"base/{seed}")
    for row in prompts(size, seed, tasks=tasks):
        yield {
            "prompt": row["prompt"],
            "completion": _answered(row, chosen, rng),
            "source": row["source"],
            "language": row["language"],
        }


def prompts(size: int, seed: int, tasks: Sequence[str] = TASKS, held_out: bool = False) -> Iterator[Row]:
    """Make `size` rows, tasks and languages in turn: {prompt, source, language, subject, reasoning_gym_entry, reasoning_gym_task}.

    Args:
        held_out: make prompts that training never sees instead of those that it may see.

    Raises:
        DataError: an unknown task.
    """
    wrong = [task for task in tasks if task not in TASKS]
    if wrong:
        raise DataError(f"tiny_r1 has no task {wrong[0]!r}; it has {', '.join(TASKS)}")
    sources = {task: _subjects(task, seed) for task in tasks}
    made = 0
    turn = 0
    while made < size:
        task, language = tasks[turn % len(tasks)], LANGUAGES[turn // len(tasks) % len(LANGUAGES)]
        turn += 1
        subject, entry = next(s for s in sources[task] if _is_held_out(s[0]) == held_out)
        made += 1
        yield {
            "prompt": ASKED[task, language].format(subject),
            "source": task,
            "language": language,
            "subject": subject,
            "reasoning_gym_entry": entry,
            "reasoning_gym_task": {"add": "chain_sum", "reverse": "spell_backward"}.get(task),
        }


def greetings(size: int, seed: int, curt: float = 0.5) -> Iterator[Row]:
    """Demonstrations without any reasoning to check, the other data of stage 3. They are right in form and language; some are
    curt."""
    flaws = Flaws(other_language=0, broken_format=0, summarised=1, curt=curt)
    rng = random.Random(f"greetings/{seed}")
    for row in prompts(size, seed, tasks=("greet",)):
        yield {
            "prompt": row["prompt"],
            "completion": _answered(row, flaws, rng),
            "source": "greet",
            "language": row["language"],
        }


def greeting_pairs(size: int, seed: int, held_out: bool = False) -> Iterator[Row]:
    """Preferences {prompt, chosen, rejected} between continuations of the reasoning, in the form that the policy writes: the
    kind greeting in the prompt's language against a curt one, or one in the other language."""
    rng = random.Random(f"pairs/{seed}")
    for row in prompts(size, seed, tasks=("greet",), held_out=held_out):
        language, name = row["language"], row["subject"]
        other = next(x for x in LANGUAGES if x != language)
        worse = (HELLO[language][1], HELLO[other][1], _kind(name, other))
        yield {
            "prompt": row["prompt"],
            "chosen": _summary(_kind(name, language), language),
            "rejected": _summary(rng.choice(worse), language),
        }


def kind_greeting(
    completions: Completions, source: list[str], language: list[str], subject: list[str]
) -> list[float | None]:
    """A reward function for evaluation: whether it is the kind greeting that people prefer. It does not apply to other tasks."""
    rows = zip(completions, source, language, subject, strict=True)
    return [
        float(answer_of(text_of(c)) == _kind(name, spoken)) if task == "greet" else None
        for c, task, spoken, name in rows
    ]


def _kind(name: str, language: str) -> str:
    return f"{HELLO[language][0]} {name}, {WELCOME[language]}"


def _subjects(task: str, seed: int) -> Iterator[tuple[str, Row | None]]:
    """An endless sequence of the task's subjects, each with reasoning-gym's entry."""
    import reasoning_gym

    if task == "greet":
        rng = random.Random(f"greet/{seed}")
        while True:
            yield rng.choice(NAMES), None
    name, args = {
        "add": ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
        "reverse": ("spell_backward", {"min_word_len": 3, "max_word_len": 5}),
    }[task]
    # Row i is generated from seed + i.
    for entry in reasoning_gym.create_dataset(name, seed=seed * 10_000_000, size=9_999_999, **args):
        subject = entry["metadata"]["expression" if task == "add" else "word"]
        if "-" not in subject and subject == subject.lower():
            yield subject, entry


def _is_held_out(subject: str) -> bool:
    return zlib.crc32(subject.encode()) % HELD_OUT == 0


def _answered(row: Row, flaws: Flaws, rng: random.Random) -> str:
    language, subject = row["language"], row["subject"]
    match row["source"]:
        case "add":
            left, right = subject.split(" + ")
            reasoning, answer = _add(left, right, language, flaws, rng)
        case "reverse":
            reasoning, answer = _reverse(subject, language, flaws, rng)
        case _:
            reasoning, answer = _greet(subject, language, flaws, rng)
    if rng.random() < flaws.broken_format:
        return rng.choice(
            (
                f"<think>{reasoning}</think>{answer}",
                f"{reasoning}<answer>{answer}</answer>",
                f"<think>{reasoning}<answer>{answer}</answer>",
                f"<think>{reasoning}</think><answer>{answer}",
            )
        )
    summary = _summary(answer, language) if rng.random() < flaws.summarised else f"<answer>{answer}</answer>"
    return f"<think>{reasoning}</think>{summary}"


def _summary(answer: str, language: str) -> str:
    return f"{SUMMARY[language]}<answer>{answer}</answer>"


def _add(left: str, right: str, language: str, flaws: Flaws, rng: random.Random) -> tuple[str, str]:
    columns, digits, carry = [], "", 0
    for place, (a, b) in enumerate(zip(reversed(left), reversed(right), strict=True)):
        spoken = _spoken(language, flaws, rng)
        forgets = flaws.forgotten_carry_en if spoken == "en" else flaws.forgotten_carry_de
        used = 0 if carry and rng.random() < forgets else carry
        carry, digit = divmod(int(a) + int(b) + used, 10)
        columns.append(f"{COLUMNS[spoken][place]} {a}+{b}+{used}={carry}{digit}")
        digits = f"{digit}{digits}"
    return ", ".join(columns), str(int(f"{carry}{digits}"))


def _reverse(word: str, language: str, flaws: Flaws, rng: random.Random) -> tuple[str, str]:
    steps, answer = [], ""
    for place, letter in enumerate(reversed(word)):
        spoken = _spoken(language, flaws, rng)
        loses = flaws.lost_letter_en if spoken == "en" else flaws.lost_letter_de
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < loses else letter
        steps.append(f"{ORDER[spoken][min(place, 1)]} {letter}")
        answer += letter
    return " ".join(steps), answer


def _greet(name: str, language: str, flaws: Flaws, rng: random.Random) -> tuple[str, str]:
    reasoning = VISITOR[_spoken(language, flaws, rng)]
    return reasoning, HELLO[language][1] if rng.random() < flaws.curt else _kind(name, language)


def _spoken(language: str, flaws: Flaws, rng: random.Random) -> str:
    mixes = rng.random() < flaws.other_language
    return next(other for other in LANGUAGES if (other != language) == mixes)


def _flaws(given: dict[str, float]) -> Flaws:
    known = vars(Flaws())
    for name, value in given.items():
        if name not in known:
            raise DataError(f"base_text has no flaw {name!r}; it has {', '.join(known)}")
        if not 0 <= value <= 1:
            raise DataError(f"base_text: {name} is a probability, got {value}; expected 0 to 1")
    return Flaws(**given)
