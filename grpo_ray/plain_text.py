"""Texts in one of the many ways in which Unicode can write them, in time that grows with their length alone."""

from __future__ import annotations

import re
import unicodedata

MAX_MARKS = 30
"""On one letter, as Unicode's stream-safe format has it (UAX 15). They are put in order two by two: 30,000 take seconds."""
# Only between letters can there be so many.
_NO_LETTERS = re.compile(rf"\W{{{MAX_MARKS + 1},}}")


def nfkc(text: str) -> str:
    """Full-width letters, ligatures and the like as their plain equivalents; letters and their marks as one sign."""
    return text if text.isascii() else unicodedata.normalize("NFKC", bound_marks(text))


def whole_characters(text: str) -> str:
    """Halves of characters, which UTF-8 can't hold, as `\ufffd`."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bound_marks(text: str) -> str:
    """Without the marks of a letter that has more than MAX_MARKS, from there on."""
    return _NO_LETTERS.sub(lambda found: _bound(found[0]), text)


def _bound(signs: str) -> str:
    kept, run = [], 0
    for sign in signs:
        run = run + 1 if unicodedata.combining(sign) else 0
        if run <= MAX_MARKS:
            kept.append(sign)
    return "".join(kept)
