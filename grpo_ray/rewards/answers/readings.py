r"""The meaning of an answer: a number, a set of several, or a formula that math-verify reads.

Plain numbers are read here and compared exactly and quickly; math-verify reads everything else, within a limit on CPU time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from grpo_ray.rewards.answers.answer_text import MAX_VALUE_CHARS, phrases, sentences, unwrap
from grpo_ray.rewards.answers.plain_numbers import (
    CURRENCY,
    NUM,
    SCALES,
    THOUSANDS,
    TIMES_TEN,
    Reading,
    read_number,
    read_ratio,
    same_number,
)
from grpo_ray.rewards.answers.warm_up import within_timeout

# ---- lists

_SEPARATOR = re.compile(
    r"\s*(?:[,;]\s*)?(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:lor|vee|quad|qquad)(?![A-Za-z])|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*|\s*;\s*"
)
_ASSIGNED = re.compile(r"([A-Za-z](?:_\{?\w{1,3}\}?)?)\s*=\s*")


_THOUSANDS_COMMAS = re.compile(r"(?<![\d,.])[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)")
_SPACED = re.compile(r"-?\d{1,30}(?:\.\d{1,30})?(?:\s+-?\d{1,30}(?:\.\d{1,30})?)+")


def split_list(text: str) -> list[str]:
    """The parts of `1, 2`, `x = 1 or x = 2`, `{1; 2}`; the text itself if it is one value, a tuple or an interval."""
    inner = text
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2].strip()
    if read_number(inner) is not None:
        return [inner]
    if _SPACED.fullmatch(inner):
        return inner.split()
    thousands = {at for number in _THOUSANDS_COMMAS.finditer(inner) for at in range(*number.span())}
    parts: list[str] = []
    depth = start = 0
    at = 0
    while at < len(inner):
        char = inner[at]
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif depth == 0 and char == "," and inner[at - 1 : at] != "\\" and at not in thousands:
            parts.append(inner[start:at])
            start = at + 1
            if word := re.match(r"\s*(?:and|or)\b|\s*\\text\s*\{\s*(?:and|or)\s*\}", inner[start : start + 30]):
                start += word.end()
                at = start - 1
        elif depth == 0 and (found := _SEPARATOR.match(inner, at)):
            parts.append(inner[start:at])
            start = found.end()
            at = start - 1
        at += 1
    parts.append(inner[start:])
    parts = [p.strip() for p in parts if p.strip()]
    return _without_variable(parts) if len(parts) > 1 else [text]


def _without_variable(parts: list[str]) -> list[str]:
    """The parts without a common variable: `x = 1`, `x = 2` and `x = 1`, `2` become 1, 2; two variables stay."""
    assigned = [_ASSIGNED.match(p) for p in parts]
    names = {found[1] for found in assigned if found}
    if len(names) != 1 or assigned[0] is None:
        return parts
    return [p[found.end() :] if found else p for p, found in zip(parts, assigned, strict=True)]


def read_list(text: str, timeout_s: float) -> Reading | None:
    """Several values, in any order; None if it is one value, or not all of them are understood."""
    parts = split_list(text)
    if len(parts) < 2 or len(parts) > 50:
        return None
    return together([read_one(part, timeout_s) for part in parts], timeout_s)


def together(members: Sequence[Reading | None], timeout_s: float) -> Reading | None:
    """The list of these values; None if one is not understood."""
    known = [m for m in members if m is not None]
    if len(known) < len(members) or any(not m.parsed for m in known):
        return None
    distinct = list({m.text: m for m in known}.values())
    if len(distinct) == 1:
        return distinct[0]
    text = ", ".join(m.text for m in distinct)
    return Reading(text, parse_formula(text, timeout_s) or (text,), members=tuple(distinct))


# ---- formulas

_LATEX_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|begin|end|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_FUNCTIONS = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|sec|csc|cot|log|ln|exp|pi|infty)(?![A-Za-z])"
)
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])")
_SQRT = re.compile(r"(?<![\\A-Za-z])\\?sqrt\s?\(([^()]{1,100})\)|(?<![\\A-Za-z])sqrt\s?(\d{1,20}|[a-z](?![a-z]))")
_CODED = re.compile(r"(?<![\w.])0[xXbBoO][0-9A-Fa-f]+")
# `She has 72` and `Sum: 72` are no products of variables.
_PROSE = re.compile(r"(?<![A-Za-z])(?!(?:mod|and|or) )[A-Za-z]{2,}(?: (?!(?:mod|and|or) )[A-Za-z]{2,}| \d|\s?:)")
_SHORT_WORDS = re.compile(
    r"(?:no|yes|up|on|in|of|to|is|am|pm|or|and|the|cm|mm|km|kg|ft|"
    r"mi|lb|oz|hr|min|sec|an|at|as|by|do|go|he|if|it|me|my|so|us|we)\Z",
    re.IGNORECASE,
)


_TOWER = re.compile(r"(?:(?:\^|\*\*)\s?\\?\w{1,10}\s?){5}")
_MAX_DEPTH = 20


def _is_tangled(text: str) -> bool:
    """Whether its brackets or powers are nested as no one writes them, which the parser takes seconds for."""
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return abs(depth) > 1 or deepest > _MAX_DEPTH or _TOWER.search(text) is not None


def formula_of(text: str) -> str | None:
    """The text as LaTeX, if it is a formula and no prose."""
    if not text or len(text) > MAX_VALUE_CHARS or "\n\n" in text or "####" in text or _CODED.search(text):
        return None
    if "$" in text.replace("\\$", "") or _is_tangled(text):
        return None
    text = _INFINITY.sub(r"\\infty ", text.replace("**", "^"))
    text = _SQRT.sub(lambda m: rf"\sqrt{{{m[1] or m[2]}}}", text)
    text = _FUNCTIONS.sub(r"\\\1 ", text)
    text = THOUSANDS.sub("", text)
    bare = _LATEX_WORDS.sub(" ", text)
    if _PROSE.search(bare):
        return None
    has_operator = re.search(r"[\d^*/+=<>|()-]", bare) is not None
    for word in _LETTERS.findall(bare):
        if len(word) > 3 or _SHORT_WORDS.match(word) or not has_operator:
            return None
    return text


def parse_formula(formula: str, timeout_s: float) -> tuple[Any, ...]:
    """The SymPy objects that math-verify reads in a formula; none if it can't read it.

    Raises:
        OutOfTimeError: it took more than `timeout_s` of CPU time.
    """
    return _parse(f"\\boxed{{{formula}}}", timeout_s)


# An OutOfTimeError is no result, and so is not cached.
@lru_cache(maxsize=4096)
def _parse(text: str, timeout_s: float) -> tuple[Any, ...]:
    import sympy
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    # `malformed_operators` reads `\frac12`, which is good TeX and frequent in MATH.
    normal = NormalizationConfig(units=True, malformed_operators=True)
    config = [LatexExtractionConfig(normalization_config=normal, boxed_match_priority=0), ExprExtractionConfig()]
    found = within_timeout(
        timeout_s, lambda: parse(text, extraction_config=config, extraction_mode="first_match", parsing_timeout=0)
    )
    return tuple(part for part in found if isinstance(part, sympy.Basic | sympy.MatrixBase) and not _is_huge(part))


def _is_huge(expression: Any) -> bool:
    """Whether computing it would take one step of C code that no clock interrupts: `9^{9^{9}}`."""
    import sympy

    for part in sympy.preorder_traversal(expression):
        if isinstance(part, sympy.Pow) and _log10(part) > _MAX_LOG10:
            return True
        if isinstance(part, sympy.factorial | sympy.binomial | sympy.factorial2) and any(
            _log10(a) > 4 for a in part.args
        ):
            return True
    return False


_MAX_LOG10 = 5000.0


def _log10(expression: Any) -> float:
    """A rough upper bound of log10 |value|; a symbol counts as 10."""
    import math

    import sympy

    if isinstance(expression, sympy.Rational):
        return math.log10(max(abs(expression.p), expression.q, 1))
    if isinstance(expression, sympy.Float):
        return math.log10(max(abs(float(expression)), 1.0)) if abs(expression) < 1e300 else math.inf
    if isinstance(expression, sympy.Pow):
        power = _log10(expression.exp)
        return math.inf if power > 7 else max(_log10(expression.base), 0.3) * 10**power
    if not expression.args:
        return 1.0
    return sum(_log10(a) for a in expression.args) + 1.0


# ---- one value, and values in prose


def read_value(text: str, timeout_s: float) -> Reading | None:
    """The value of a text that is an answer as a whole: one value, or a list of several (`1, 2`, `12 or 13`); None if it is
    neither.

    Raises:
        OutOfTimeError: reading it took more than `timeout_s` of CPU time.
    """
    if len(text) > 4 * MAX_VALUE_CHARS:
        return None
    text = unwrap(text)
    return read_list(text, timeout_s) or read_one(text, timeout_s)


_RANGE = re.compile(
    r"[-+]?\(?\d[\d.]*\)?(?:\s?-{1,2}\s?\(?\d[\d.]*\)?){1,6}|\d{1,4}(?:/\d{1,4}){2}|[vV]?\d+(?:\.\d+){2,}|[vV]\d+(?:\.\d+)+"
    r"|\+?\(?\d+\)?(?:[ .-]+\(?\d+\)?)+|\d{4}-\d{1,2}-\d{1,2}[T ].*|\d+(?:st|nd|rd|th)"
)
_ABOUT = re.compile(r"(?<=\S)\s*\\approx(?:eq)?(?![A-Za-z])")
_DIFFERENCE = re.compile(r"[-+]?\(?\d+\)?(?:\s?-\s?\(?\d+\)?)+")
_LEAD = re.compile(
    r"(?:so|thus|hence|therefore|then|and|now|finally|we get|we have|this gives|it is|it's|that is|i get)\b[,:]?\s+",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"\s*(?:\\(?:text|textbf|mathbf|mathrm|mbox)\s*\{\s*[A-Za-z][A-Za-z ]{0,40}:\s*\}|[A-Za-z][A-Za-z ]{0,40}:\s)\s*(?=\S)"
)
_OPTION = re.compile(
    r"\s*(?:\\(?:text|textbf|mathbf|mathrm)\s*\{\s*)?(?:\(([A-J])\)|([A-J])[.):])\s*\}?\s*(?:~|\\ )?(?=\S)"
)


def is_ambiguous(text: str) -> bool:
    """Whether it only looks like arithmetic: a date, a range, a telephone number, a version (`2024-01-02`, `3-5`, `1.2.3`)."""
    text = unwrap(text)
    return read_number(text) is None and _RANGE.fullmatch(text) is not None


def read_one(text: str, timeout_s: float) -> Reading | None:
    """The value of a text that is one value as a whole."""
    text = unwrap(text)
    if label := _LABEL.match(text) or _OPTION.match(text):
        text = unwrap(text[label.end() :])
    if found := read_number(text) or read_ratio(text):
        return found
    text = _ABOUT.sub("=", text)
    if "=" in text and not _LETTERS.search(_LATEX_WORDS.sub(" ", text.rpartition("=")[0])):
        head, _, tail = text.rpartition("=")
        if not re.search(r"[A-Za-z<>!]$|[A-Za-z]", _LATEX_WORDS.sub(" ", head)) and (
            found := read_one(tail, timeout_s)
        ):
            return found
    if _RANGE.fullmatch(text) and not _DIFFERENCE.fullmatch(text):
        return None
    formula = formula_of(text)
    if formula is None:
        # `x = 72 apples`
        tail = text.rpartition("=")[2] if "=" in text else ""
        return read_number(unwrap(tail)) if tail else None
    parsed = parse_formula(formula, timeout_s)
    return Reading(" ".join(formula.split()), parsed) if parsed else None


_PROSE_NUMBER = (
    rf"(?:(?:[A-Za-z]\s?=\s?)?[-+]?{CURRENCY}[-+]?(?:\d{{1,15}}\s\d{{1,9}}/\d{{1,9}}|\d{{1,30}}/\d{{1,30}}|{NUM})"
    rf"(?:{TIMES_TEN}[+-]?\d{{1,3}}\s?\}}?)?(?:\s?(?:\\?%|[Pp]er ?cent\b))?(?:\s(?:{'|'.join(SCALES)})\b)?)"
)
_NO_NUMBER_BEFORE = r"(?<![A-Za-z0-9_.^{])(?<!\d[-/:,])"
_NO_NUMBER_AFTER = r"(?![-/:]?\d)"
_ITEM = rf"{_NO_NUMBER_BEFORE}{_PROSE_NUMBER}{_NO_NUMBER_AFTER}"
_NUMBERS = re.compile(rf"{_ITEM}(?:(?:\s?,\s?{_ITEM}){{0,20}}\s?,?\s(?:or|and)\s{_ITEM})?")
_FORMULA = (
    r"-?\d{0,9}\\d?frac\{[^{}$]{1,40}\}\{[^{}$]{1,40}\}|-?\d{0,9}\\(?:sqrt\{[^{}$]{1,40}\}|pi\b)"
    r"|\$\$[^$]{1,500}\$\$|(?<![\\\d])\$[^$\n]{1,500}\$"
)
_FORMULAS = re.compile(rf"(?:{_FORMULA})(?:\s?(?:,\s?(?:and|or)?|and|or)\s?(?:{_FORMULA}))*")
_CLAUSE = re.compile(
    r",?\s(?:because|since|which|as|so|where|when|if|with|given|and (?:not|hence|therefore|so|I|the|we|it)|but|not|rather|instead|"
    r"for|per|in (?:all|total)|I hope)\b|\s[(]|;\s|,\s(?=[A-Za-z]{2})|\s-\s|\s(?:hence|thus|therefore)\b"
)


_NOT = re.compile(r"(?:\bnot|n't|\\ne|\\neq)\s*\$?\Z", re.IGNORECASE)


def read_answer_phrase(said: str, timeout_s: float) -> Reading | None:
    """The value in the text after `the answer is`: the one that it begins with, or the first one in it."""
    first = next(iter(sentences(said)), "")
    for text in (first.rstrip("!?"), _CLAUSE.split(first, maxsplit=1)[0]):
        if found := read_value(_LEAD.sub("", text), timeout_s):
            return found
    formula, number = _FORMULAS.search(first), _NUMBERS.search(first)
    for match in sorted((m for m in (formula, number) if m), key=lambda m: m.start()):
        if found := read_value(match[0].replace("$", "") if match is formula else match[0], timeout_s):
            return found
    return None


def read_sentence(sentence: str, timeout_s: float) -> Reading | None:
    """The value of a sentence at the end of a text: its only one, or the last one in it."""
    text = sentence.rstrip("!?")
    for _ in range(3):
        text = _LEAD.sub("", text, count=1) if _LEAD.match(text) else text
    if found := read_value(text, timeout_s):
        return found
    matches = [*_FORMULAS.finditer(sentence), *_NUMBERS.finditer(sentence)]
    said = [m for m in matches if not _NOT.search(sentence, max(0, m.start() - 20), m.start())]
    for match in sorted(said, key=lambda m: (m.end(), -m.start()), reverse=True)[:3]:
        if found := read_value(match[0].replace("$", "") if match[0].startswith("$") else match[0], timeout_s):
            return found
    return None


def read_phrases(text: str, timeout_s: float) -> Reading | None:
    """The value after the last `the answer is`; None if there is no such phrase, or none that is understood."""
    for said in phrases(text):
        if found := read_answer_phrase(said, timeout_s):
            return found
    return None


# ---- equality


def same_value(gold: Reading, answer: Reading, timeout_s: float) -> bool:
    """Whether an answer equals a gold answer, by math-verify if they are not plain numbers.

    Raises:
        OutOfTimeError: comparing them took more than `timeout_s` of CPU time.
    """
    if gold.text == answer.text:
        return True
    if gold.number is not None and answer.number is not None:
        return same_number(gold, answer)
    if not gold.parsed or not answer.parsed:
        return False
    if gold.members and answer.members and all(m.number is not None for m in (*gold.members, *answer.members)):
        return _same_numbers(gold.members, answer.members)
    from math_verify import verify

    g, a = list(gold.parsed), list(answer.parsed)
    return within_timeout(timeout_s, lambda: verify(g, a, timeout_seconds=0) and not _far_apart(g[0], a[0]))


def _same_numbers(gold: Sequence[Reading], answer: Sequence[Reading]) -> bool:
    """Whether both have the same members, in any order."""
    return all(any(same_number(g, a) for a in answer) for g in gold) and all(
        any(same_number(g, a) for g in gold) for a in answer
    )


def _far_apart(gold: Any, answer: Any) -> bool:
    """Whether two numbers that agree in 6 places are not equal to 3 significant digits: 1e-8 is not 0."""
    try:
        if not (gold.is_number and answer.is_number):
            return False
        g, a = complex(gold), complex(answer)
        return abs(g - a) > max(abs(g) / 1000, 1e-9 if g == 0 else 0.0) and abs(g - a) < 1e-5
    except Exception:
        # Numbers beyond what a float holds are not distinguished here either.
        return False
