"""Unicode normalisation of texts that can be written in many ways, in time linear in their length."""

from __future__ import annotations

import re
import unicodedata

MAX_MARKS = 30
"""The most marks on one letter, as in Unicode's stream-safe format (UAX 15). They are sorted pair by pair: 30,000 take seconds."""
# Only between letters can there be so many.
_NO_LETTERS = re.compile(rf"\W{{{MAX_MARKS + 1},}}")


MAX_GROWTH = 1.5
"""The largest growth of a text by its plain equivalents: there are signs for 18 letters."""


def nfkc(text: str) -> str:
    """Normalise full-width letters, ligatures and the like to plain equivalents; letters and their marks become one sign. If that
    makes the text much longer, signs for several letters stay as they are.
    """
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
    """The text with lone surrogates, which UTF-8 cannot hold, as `\ufffd`."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bound_marks(text: str) -> str:
    """The text without the marks of a letter beyond MAX_MARKS."""
    return _NO_LETTERS.sub(lambda found: _bound(found[0]), text)


def _bound(signs: str) -> str:
    kept, run = [], 0
    for sign in signs:
        run = run + 1 if unicodedata.combining(sign) else 0
        if run <= MAX_MARKS:
            kept.append(sign)
    return "".join(kept)
