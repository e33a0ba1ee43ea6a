"""Suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

ALIKE = 0.6
"""The least ratio of `difflib`: `smoek` is `smoke` (0.8), `smoke` is not `chat` (0)."""


def closest(name: str, known: Iterable[str], cutoff: float = ALIKE) -> str | None:
    """The known name with the most similar spelling; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(
    name: str,
    known: Iterable[str],
    otherwise: str = "",
    *,
    cutoff: float = ALIKE,
    count: int = 1,
    show: Callable[[str], str] = str,
    then: str = "",
) -> str:
    """The suggestion, e.g. `did you mean smoke?`

    Args:
        name: the unknown name.
        known: the existing names.
        otherwise: the text where no name is similar.
        cutoff: the least similarity.
        count: the most names.
        show: formats a name.
        then: the text that follows in either case.
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    hint = f"did you mean {', '.join(map(show, close))}?" if close else otherwise
    return " ".join(part for part in (hint, then) if part)
