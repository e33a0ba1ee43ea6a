"""Texts in one of the many ways in which Unicode can write them, in time that grows with their length alone."""

from __future__ import annotations

import re
import unicodedata

MAX_MARKS = 30
"""On one letter, as Unicode's stream-safe format has it (UAX 15). They are put in order two by two: 30,000 take seconds."""
# Only between letters can there be so many.
_NO_LETTERS = re.compile(rf"\W{{{MAX_MARKS + 1},}}")


MAX_GROWTH = 1.5
"""Of a text by its plain equivalents: there are signs for 18 letters."""


def nfkc(text: str) -> str:
    """Full-width letters, ligatures and the like as their plain equivalents; letters and their marks as one sign. Where that makes
    much more of a text, signs for several letters stay as they are."""
    if text.isascii():
        return text
    bound = bound_marks(text)
    plain = unicodedata.normalize("NFKC", bound)
    if len(plain) <= MAX_GROWTH * len(text) + MAX_MARKS:
        return plain
    long = {sign for sign in set(bound) if len(unicodedata.normalize("NFKC", sign)) > 1}
    parts = re.split(f"([{re.escape(''.join(long))}])", bound)
    return "".join(part if part in long else unicodedata.normalize("NFKC", part) for part in parts)


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
