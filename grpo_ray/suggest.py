"""What was meant by a name that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

ALIKE = 0.6
"""Of `difflib`'s ratio: `smoek` is `smoke` (0.8), `smoke` is not `chat` (0)."""


def closest(name: str, known: Iterable[str], cutoff: float = ALIKE) -> str | None:
    """The one that is spelt most alike; None: none is."""
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
    """`did you mean smoke?`

    Args:
        name: that there is not.
        known: those that there are.
        otherwise: what is said where none is spelt alike.
        cutoff: how alike.
        count: names at most.
        show: how a name is written.
        then: what is said in either case.
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    hint = f"did you mean {', '.join(map(show, close))}?" if close else otherwise
    return " ".join(part for part in (hint, then) if part)
