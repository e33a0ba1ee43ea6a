r"""Plain numbers, read and compared exactly and quickly: thousands, currencies, units, percent signs, exponents, ratios."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Reading:
    """An answer as it was understood."""

    text: str
    """The normalised text: equal texts mean the same."""
    formula: tuple[Any, ...] = ()
    """The SymPy objects for math-verify, if it is no plain number."""
    number: Fraction | None = None
    """The exact value of a plain number; of a percentage, the number before the sign."""
    is_percent: bool = False
    has_point: bool = False
    """Whether it has a decimal point or an exponent, so that it may be rounded."""
    members: tuple[Reading, ...] = ()
    """The values of a list of several."""

    @cached_property
    def parsed(self) -> tuple[Any, ...]:
        """The SymPy objects for math-verify; SymPy is imported for them."""
        return self.formula if self.number is None else (_symbol(self.number, self.has_point, self.is_percent),)


_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!,?\d)|[1-9]\d{0,2}(?:[ ']\d{3})+(?!\d)|\d+(?:_\d{3})*)"
NUM = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w.]))?"
TIMES_TEN = r"\s*(?:\\times|\\cdot|[xX*])\s*10\s*(?:\^|\*\*)\s*\{?\s*"
CURRENCY = r"(?:(?:US|CA|AU|HK)?\\?\$|[€£¥₹₩₽]|(?:USD|EUR|GBP|INR|RMB|CNY)\s)?"
_CURRENCY_WORD = r"(?:\s?(?:\\?\$|[€£¥₹₩₽]))?"
SCALES = {"hundred": 10**2, "dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Units are ignored, as in math-verify. No word may say more than a unit: `5 or more`, `10 AM`, `12th`.
_NO_UNIT = (
    r"(?!(?:or|and|to|than|if|is|are|mod|not|plus|minus|times|over|per cent|am|pm|a\.m|p\.m|AM|PM|BC|AD|BCE|CE|"
    r"more|less|through|until|e|i|x|of|pi|sqrt|"
    r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|january|february|march|april|june|july|august|september|october|"
    r"november|december)\b)"
)
_WORD = rf"(?:{_NO_UNIT}(?:[a-zµ]{{2,20}}|[A-Z]{{2,4}}|[gmhsLNJWVAKCFcd])(?![A-Za-z])(?:\^\{{?-?\d\}}?)?)"
# Without a space only units that are no product of variables: `5cm`, but not `2xy`.
_GLUED = (
    r"(?:[cmkdnµ]?m|[kmµ]?g|[kmcdµ]?[lL]|[kM]?Hz|[kMG]?[WJVN]|kWh|[mnµ]?s|in|ft|yd|mi|lbs?|oz|hrs?|mins?|secs?|mph|km/h|m/s|kph|"
    r"degrees|points?|units?)(?:\^\{?-?\d\}?)?(?![A-Za-z])"
)
_UNIT = (
    rf"(?:\s*\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{{\s*(?:{_WORD}[\s./*-]{{0,3}}){{1,6}}\}}(?:\^\{{?-?\d\}}?)?"
    rf"|\s*\^\s*(?:\\circ|\{{\\circ\}})(?:\s*[CF]\b)?|\\degree|{_GLUED}"
    rf"|\s+{_WORD}(?:[ /*.-]{{1,2}}{_WORD}){{0,5}})"
)
_PERCENT = r"(?P<percent>\s*(?:\\?%|[Pp]er ?cent(?:age)?\b|\bpct\b))?"
_SCALE = rf"(?:\s*(?P<scale>{'|'.join(SCALES)})s?\b)?"
_APPROXIMATELY = r"(?:\\approx|approximately|approx\.?|about|roughly|around)?\s*"
_WHOLE_NUMBER = re.compile(
    rf"{_APPROXIMATELY}(?P<sign>[+-]?)\s?{CURRENCY}\s?(?P<sign2>[+-]?)"
    rf"(?:(?P<whole>\d{{1,15}})\s(?P<mixed>\d{{1,15}}/\d{{1,15}})|(?P<over>\d{{1,30}}\s?/\s?-?\d{{1,30}})(?![\d/])|(?P<num>{NUM})(?:{TIMES_TEN}(?P<power>[+-]?\d{{1,3}})\s*\}}?)?)"
    rf"{_CURRENCY_WORD}{_PERCENT}{_SCALE}(?P<unit>{_UNIT})?"
)
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,!]|,?\\ |\\,)\s?(?=\d{3}(?!\d))")
_MAX_DIGITS = 400
_FLOAT_NOISE = Fraction(1, 10**12)


def read_number(text: str) -> Reading | None:
    """A plain number with or without thousands, a currency, a unit, a percent sign, an exponent; None if it is no such thing."""
    text = THOUSANDS.sub("", text)
    found = _WHOLE_NUMBER.fullmatch(text)
    if found is None or len(text) > _MAX_DIGITS:
        return None
    sign = -1 if "-" in (found["sign"], found["sign2"]) else 1
    has_point = False
    if found["whole"]:
        upper, _, lower = found["mixed"].partition("/")
        if int(lower) == 0:
            return None
        value = int(found["whole"]) + Fraction(int(upper), int(lower))
    elif found["over"]:
        upper, _, lower = found["over"].replace(" ", "").partition("/")
        if int(lower) == 0:
            return None
        value = Fraction(int(upper), int(lower))
    else:
        digits = re.sub(r"[,' _]", "", found["num"]).rstrip(".")
        power = int(found["power"] or 0)
        has_point = "." in digits or "e" in digits.lower() or power < 0
        value = Fraction(digits) * Fraction(10) ** power
    value *= sign * SCALES.get(found["scale"] or "", 1)
    return number_reading(value, has_point=has_point, is_percent=found["percent"] is not None)


def number_reading(value: Fraction, *, has_point: bool = False, is_percent: bool = False) -> Reading:
    """The reading of a number that is already known."""
    text = f"{value}%" if is_percent else str(value)
    return Reading(text, (), value, is_percent, has_point and value.denominator != 1)


def _symbol(value: Fraction, has_point: bool, is_percent: bool) -> Any:
    import sympy

    number: Any = sympy.Rational(value.numerator, value.denominator)
    if has_point:
        number = sympy.Float(number, 40)
    if is_percent:
        number = sympy.Mul(number, sympy.UnevaluatedExpr(sympy.Rational(1, 100)), evaluate=False)
    return number


def same_number(gold: Reading, answer: Reading) -> bool:
    """Whether two plain numbers are equal: decimals to math-verify's 6 places, and to 3 significant digits at least.

    A percentage is its hundredth; from 1% on, also the number before the sign, because the sign is often left out.
    """
    tolerant = gold.has_point or answer.has_point
    return any(_close(g, a, tolerant) for g, a in _pairs(gold, answer))


def _pairs(gold: Reading, answer: Reading) -> list[tuple[Fraction, Fraction]]:
    assert gold.number is not None
    assert answer.number is not None
    g, a = gold.number, answer.number
    if gold.is_percent and answer.is_percent:
        return [(g, a)]
    if gold.is_percent:
        return [(g / 100, a), *([(g, a)] if abs(g) >= 1 else [])]
    if answer.is_percent:
        return [(g, a / 100), *([(g, a)] if abs(a) >= 1 else [])]
    return [(g, a)]


def _close(gold: Fraction, answer: Fraction, tolerant: bool) -> bool:
    if gold == answer:
        return True
    apart = abs(gold - answer)
    if not tolerant:
        return False
    if gold == 0:
        return apart < Fraction(1, 10**9)
    return apart <= abs(gold) * _FLOAT_NOISE or (round(gold, 6) == round(answer, 6) and apart <= abs(gold) / 1000)


# ---- ratios and times

_RATIO = re.compile(r"(\d{1,9})\s?(?::|\\colon|\\mathbin\{:\})\s?(\d{1,9})(?:\s?(?::|\\colon)\s?(\d{1,9}))?")


def read_ratio(text: str) -> Reading | None:
    """The fraction that `3:4` is; what may be a time (`10:30`) is read literally."""
    found = _RATIO.fullmatch(text)
    if found is None:
        return None
    first, second, third = (int(g) if g else None for g in found.groups())
    assert first is not None
    assert second is not None
    text = ":".join(str(n) for n in (first, second, third) if n is not None)
    if third is not None or not second or (first < 25 and len(found[2]) == 2 and second < 60):
        return Reading(text, ())
    return Reading(text, number=Fraction(first, second))
