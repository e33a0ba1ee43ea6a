r"""The meaning of a gold answer, whatever type the data holds it in, and whether a completion gives it.

A gold answer that is not understood has no meaning here rather than a wrong one: `accuracy` does not apply to its row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

from grpo_ray import json_text
from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers import readings
from grpo_ray.rewards.answers.answer_text import (
    ends_in_a_cut_box,
    final_text,
    is_text_command,
    last_box,
    last_sentences,
    marked_number,
    phrases,
    plain_characters,
    sentences,
    unwrap,
    without_bullets,
    without_markup,
)
from grpo_ray.rewards.answers.cpu_clock import OutOfTimeError
from grpo_ray.rewards.answers.plain_numbers import Reading, number_reading
from grpo_ray.rewards.answers.readings import read_answer_phrase, read_phrases, read_sentence, read_value, same_value
from grpo_ray.rewards.answers.warm_up import within_timeout

COLUMNS = ("answer", "solution")
"""The columns of gold answers; the first that a row has counts."""
TIMEOUT_S = 0.5
"""The CPU seconds for a completion."""
GOLD_TIMES = 6
"""The factor of the time limit for a gold answer, which is read once for all completions."""
MAX_GOLD_CHARS = 100_000
MAX_GOLD_BITS = 4000


@dataclass(frozen=True)
class Gold:
    """One right answer: a value, letters of a multiple choice, or words in `\\text{}`; a choice may have its value beside it."""

    value: Reading | None = None
    letters: frozenset[str] = frozenset()
    words: str = ""
    marked: bool = False
    """Whether it follows `####`, as in GSM8K."""


def gold_of(row: Mapping[str, Any]) -> tuple[str, Any]:
    """(column, gold answer) of a row's columns; ("", None) where it has none."""
    return next(((name, row[name]) for name in COLUMNS if row.get(name) is not None), ("", None))


def golds_of(answer: Sequence[Any] | None, solution: Sequence[Any] | None, count: int) -> list[Any]:
    """The gold answers [S] of the two columns as reward functions get them: each a list of `count` values, or None."""
    columns = [values or [None] * count for values in (answer, solution)]
    return [gold_of(dict(zip(COLUMNS, row, strict=True)))[1] for row in zip(*columns, strict=True)]


def read_gold(value: Any, timeout_s: float) -> tuple[Gold, ...]:
    """The right answers that a gold answer allows; none if it is not understood.

    A list holds alternatives, as in OlympiadBench and Skywork-OR1: each is right, and so are all of them together. If one is not
    understood, none counts: an answer that equals no other could still be right.

    Raises:
        RewardError: reading it took more than `timeout_s` of CPU time.
    """
    try:
        return _read(value, timeout_s)
    except OutOfTimeError:
        raise RewardError(
            f"reward 'accuracy': to read the gold answer {str(value)[:80]!r} took more than {timeout_s:g} s of CPU time; raise "
            "timeout_s in the args of this reward, or leave the row out"
        ) from None


def _read(value: Any, timeout_s: float) -> tuple[Gold, ...]:
    if hasattr(value, "tolist"):
        # NumPy's scalars and arrays; a 32-bit float in its own shortest form.
        value = float(str(value)) if type(value).__name__ in ("float16", "float32") else value.tolist()
    if isinstance(value, str):
        listed = _listed(value)
        return _read_list(listed, timeout_s) if listed is not None else _read_text(value, timeout_s)
    if isinstance(value, list | tuple | set | frozenset):
        return _read_list(list(value), timeout_s)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | Fraction):
        return ()
    return tuple(Gold(number) for number in _numbers(value))


def _numbers(value: int | float | Decimal | Fraction) -> list[Reading]:
    """A number as it was written; a float also as the 32-bit one that Parquet may have widened."""
    if isinstance(value, float | Decimal) and not math.isfinite(value):
        return []
    if isinstance(value, int) and value.bit_length() > MAX_GOLD_BITS:
        return []
    if isinstance(value, Decimal) and abs(value.adjusted()) > MAX_GOLD_BITS:
        return []
    if not isinstance(value, float):
        return [number_reading(Fraction(value), has_point=isinstance(value, Decimal))]
    import numpy as np

    exact = number_reading(Fraction(repr(value)), has_point=True)
    narrow = np.float32(value) if abs(value) < 3e38 else np.float32(0)
    if value.is_integer() or float(narrow) != value:
        return [exact]
    short, long = (np.format_float_positional(v, trim="-") for v in (narrow, np.float64(value)))
    return [exact] if short == long else [exact, number_reading(Fraction(short), has_point=True)]


_LISTED = re.compile(r"\[\s*'[^'\\]*'(?:\s*,\s*'[^'\\]*')*\s*,?\s*\]")


def _listed(text: str) -> list[Any] | None:
    """The entries of a list of texts that was stored as one text, `["12"]`; None if it is something else."""
    text = text.strip()
    if not text.startswith(('["', "['", '[ "', "[ '")) or len(text) > MAX_GOLD_CHARS:
        return None
    if _LISTED.fullmatch(text):
        return re.findall(r"'([^']*)'", text)
    try:
        found = json_text.read(text)
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def _read_list(values: Sequence[Any], timeout_s: float) -> tuple[Gold, ...]:
    values = [v for v in values if v is not None and v != "" and v != []]
    if len(values) == 1 and not isinstance(values[0], tuple):  # A map of Parquet is a list of (key, value).
        return _read(values[0], timeout_s)
    each: list[tuple[Gold, ...]] = []
    for value in values[:100]:
        if isinstance(value, list | tuple | dict) or not (found := _read(value, timeout_s)):
            return ()
        each.append(found)
    golds = tuple(gold for found in each for gold in found)
    return (*golds, *_all_of([found[0] for found in each], timeout_s))


def _all_of(golds: Sequence[Gold], timeout_s: float) -> list[Gold]:
    """The answer that consists of all of them."""
    if not golds:
        return []
    if all(gold.letters for gold in golds):
        return [Gold(letters=frozenset[str]().union(*(gold.letters for gold in golds)))]
    listed = readings.together([gold.value for gold in golds], timeout_s) if len(golds) > 1 else None
    return [Gold(listed, marked=any(gold.marked for gold in golds))] if listed else []


# ---- texts


@lru_cache(maxsize=4096)
def _read_text(text: str, timeout_s: float) -> tuple[Gold, ...]:
    """The right answers in a text, cached, since the samples of a group share their gold; running out of time is not cached."""
    if len(text) > MAX_GOLD_CHARS or not text.strip():
        return ()
    text = plain_characters(text).strip()
    marked = "####" in text
    if marked:
        text = next((line for line in text.rpartition("####")[2].splitlines() if line.strip()), "")
    final = without_markup(final_text(text)).strip()
    box = last_box(text)
    whole = box if box is not None else final
    found = _read_whole(whole, timeout_s)
    if found is None and box is None:
        found = _read_solution(final, timeout_s)
    return () if found is None else (replace(found, marked=marked),)


def _read_whole(text: str, timeout_s: float) -> Gold | None:
    """A gold that is one answer as a whole."""
    if choice := whole_choice(text):
        letters, rest = choice
        return Gold(read_value(rest, timeout_s) if rest else None, letters)
    inner = unwrap(text)
    if readings.is_ambiguous(inner) or re.search(r"[A-Za-z]\s*:|^\W*$", inner):
        return None
    value = read_value(text, timeout_s)
    if value is not None and value.members and re.search(r"(?<![\\A-Za-z{])(?!and\b)[a-z]{3,}", inner):
        return None  # `3 apples and 4 pears` is more than two numbers.
    if value is not None and not (is_text_command(text) and value.number is None):
        return Gold(value)
    if is_text_command(text) and re.search(r"[^\W\d_]", inner):
        return Gold(words=normal_words(text))
    return None


def _read_solution(text: str, timeout_s: float) -> Gold | None:
    """The gold answer of a whole solution: what it calls the answer, or the value of the equation or formula that it ends in.

    The last number of other prose does not count: `iPhone 12` is not 12.
    """
    for said in phrases(text):
        if (choice := leading_choice(said)) and (letters := choice):
            return Gold(letters=letters)
        if readings.is_ambiguous(next(iter(sentences(said)), "")):
            return None
        if value := read_answer_phrase(said, timeout_s):
            return Gold(value)
    last = next(iter(last_sentences(text)), "")
    formula = re.search(r"(\$[^$\n]+\$|\$\$[^$]+\$\$)\s*$", last)
    tail = formula[1].strip("$") if formula else last.rpartition("=")[2] if "=" in last else ""
    if not tail or readings.is_ambiguous(tail) or not text.rstrip().rstrip(".").endswith(last.rstrip()):
        return None
    value = read_value(tail, timeout_s)
    return Gold(value) if value else None


# ---- multiple choice

_CHOICE = r"(?:\(\s?([A-J])\s?\)|\[\s?([A-J])\s?\]|([A-J])(?![A-Za-z0-9']))"
_COMMANDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|boxed|mbox|bf|quad|qquad|ensuremath)(?![A-Za-z])\s?|\\[ ,;:!]|[{}$*`]|~"
)
_LIST = re.compile(
    rf"(?:(?:options?|choices?|answers?)\s)?{_CHOICE}(?:\s?(?:,\s?(?:and|or)?|;|/|&|\+|and|or)\s?{_CHOICE})*",
    re.IGNORECASE,
)
_ENDS = re.compile(r"\s?(?:[.,:;!?]|$|(?:because|since|as|is|with|which|for)\b|-\s)")
_MENTIONED = re.compile(
    rf"\b(?:options?|choices?|choose|pick|select|answer)\s(?:is\s|option\s)?(?={_CHOICE})", re.IGNORECASE
)
"""The mention of a choice; it ends where the choice begins."""


_CALLED = re.compile(
    r"(?<![A-Za-z])((?:\([A-J]\)|[A-J])(?:,? (?:and|or) (?:\([A-J]\)|[A-J]))*) (?:is|are) "
    r"(?:the )?(?:correct|right|best|answer|true)\b"
)

_CAPITAL = re.compile(r"(?<![A-Za-z\\])[A-J](?![A-Za-z'])")
_CLOSES = re.compile(r"(?:\([A-J]\)|\$[A-J]\$|(?:[,:\u2192-]|=>|\bwith)\s[A-J])[.!]?$")


def whole_choice(text: str) -> tuple[frozenset[str], str] | None:
    """The letters of a text that is only a choice, and the value beside it: `C`, `(C)`, `A, C`, `(C) 42`, `ABD`."""
    plain = _COMMANDS.sub("", unwrap(text)).strip().rstrip(".").strip()
    if re.fullmatch(r"[A-F]{2,6}", plain) and list(plain) == sorted(set(plain)):
        return frozenset(plain), ""
    found = _LIST.match(plain)
    if found is None:
        return None
    letters = _letters(found[0])
    rest = plain[found.end() :]
    if letters is None or (rest and not (found[0].endswith((")", "]")) or re.match(r"[.):]", rest))):
        return None
    return letters, rest.lstrip(".):] ").strip()


def _letters(text: str) -> frozenset[str] | None:
    """The letters of a choice: capitals, in brackets also small ones; None if one of them is no choice."""
    found = re.findall(r"(?<![A-Za-z])([A-Ja-j])(?![A-Za-z])", text)
    bare = re.findall(r"(?<![A-Za-z(\[])([a-j])(?![A-Za-z)\]])", text)
    return None if bare or not found else frozenset(letter.upper() for letter in found)


def leading_choice(said: str) -> frozenset[str] | None:
    """The letters that a phrase begins with: `(C), because (A) is too small`, `A or C`; None if it begins with something else."""
    plain = _COMMANDS.sub("", said).strip()
    found = _LIST.match(plain)
    if found is None or (letters := _letters(found[0])) is None:
        return None
    rest = plain[found.end() :]
    return letters if found[0].endswith((")", "]")) or _ENDS.match(rest) or re.match(r"[)\].:]", rest) else None


def chosen(completion: str) -> frozenset[str] | None:
    """The letters that a completion chooses: in its box, its stated answer, or its last line; None if it chooses none."""
    final = plain_characters(final_text(completion))
    box = last_box(final)
    if box is not None:
        whole = whole_choice(box)
        return whole[0] if whole else leading_choice(box) or _small_letter(box)
    if ends_in_a_cut_box(final):
        return None
    final = without_markup(without_bullets(final)).strip()
    if (whole := whole_choice(final.partition("\n")[0])) and "\n" not in final:
        return whole[0]
    for said in phrases(final):
        if letters := leading_choice(said):
            return letters
    before, _, last = final.rpartition("\n")
    if whole := whole_choice(last):
        # The last one in a list of options is not chosen.
        is_option = bool(whole[1]) and whole_choice(before.rstrip().rpartition("\n")[2]) is not None
        return None if is_option else whole[0]
    if called := _CALLED.findall(last):
        return _letters(called[-1]) if len(called) == 1 else None
    mentions = [m for m in _MENTIONED.finditer(last) if _letters(next(g for g in m.groups() if g)) is not None]
    if mentions:
        found = _LIST.match(_COMMANDS.sub("", last[mentions[-1].end() :]))
        listed = _letters(found[0]) if found else None
        return listed or frozenset(next(g for g in mentions[-1].groups() if g))
    return _closing_letter(last) or _small_letter(final)


def _closing_letter(line: str) -> frozenset[str] | None:
    """The only letter of a line, which ends with it: `None of these (D)`, `Hence $C$.`, `Therefore, C.`"""
    plain = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]{1,9})\}", r"\1", line.strip())
    capitals = _CAPITAL.findall(plain)
    return frozenset(capitals) if len(capitals) == 1 and _CLOSES.search(plain) else None


def _small_letter(text: str) -> frozenset[str] | None:
    inner = unwrap(text).strip("().")
    return frozenset(inner.upper()) if re.fullmatch(r"[a-j]", inner) else None


# ---- words


def normal_words(text: str) -> str:
    """The words without case, commands, punctuation at the ends and extra white space."""
    return " ".join(_COMMANDS.sub("", unwrap(text)).casefold().strip(" .,;:!?\"'").split())


def said_words(completion: str) -> list[str]:
    """The parts of a completion that may be its answer in words: only the box if there is one."""
    final = plain_characters(final_text(completion))
    box = last_box(final)
    if box is not None:
        return [normal_words(box)]
    final = without_markup(final).strip()
    said = [part for phrase in phrases(final) for part in (phrase, next(iter(sentences(phrase)), ""))][:2]
    return [normal_words(part) for part in (said or [final[-1000:], final.rpartition("\n")[2]]) if len(part) <= 1000]


# ---- values


def read_answer(completion: str, marked: bool, timeout_s: float) -> Reading | None:
    """The value that a completion answers with; None if it gives none that is understood.

    Args:
        marked: whether the gold answer has the form `#### 42`, so that such a line is searched first.

    Raises:
        OutOfTimeError: reading it took more than `timeout_s` of CPU time.
    """
    final = plain_characters(final_text(completion))
    mark = marked_number(final)
    box = last_box(final)
    if mark is not None and (marked or (box is None and not phrases(final.rpartition("####")[2]))):
        return read_value(mark, timeout_s)
    if box is not None:
        return read_value(box, timeout_s)
    if ends_in_a_cut_box(final):
        return None
    final = without_markup(without_bullets(final)).strip()
    if "\n\n" not in final and (found := read_value(final, timeout_s)):
        return found
    if found := read_phrases(final, timeout_s):
        return found
    return next((found for s in last_sentences(final) if (found := read_sentence(s, timeout_s))), None)


def is_right(completion: str, golds: Sequence[Gold], timeout_s: float) -> bool:
    """Whether a completion gives one of these answers; one that takes more than `timeout_s` of CPU time in total is wrong."""
    try:
        return within_timeout(timeout_s, lambda: _is_right(completion, golds, timeout_s))
    except OutOfTimeError:
        return False


def _is_right(completion: str, golds: Sequence[Gold], timeout_s: float) -> bool:
    if any(gold.letters for gold in golds):
        letters = chosen(completion)
        if letters is not None:
            return any(gold.letters == letters for gold in golds)
    if any(gold.words and gold.words in said_words(completion) for gold in golds):
        return True
    values = [gold.value for gold in golds if gold.value is not None]
    if not values:
        return False
    # `48 + 24 = 72!` may be a sum or a factorial.
    plain = completion.rstrip()
    for said in (completion, plain[:-1]) if plain.endswith("!") else (completion,):
        answer = read_answer(said, golds[0].marked, timeout_s)
        if answer is not None and any(same_value(value, answer, timeout_s) for value in values):
            return True
    return False
