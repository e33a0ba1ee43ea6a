"""What commands print with. Text of users (prompts, paths, what models wrote) is printed as it is: no markup, no emoji codes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def plain_console(**options: Any) -> Console:
    """A console that prints strings literally; what has a style is a `Text`."""
    return Console(highlight=False, markup=False, emoji=False, **options)


def headed(head: str, style: str, rest: str) -> Text:
    """A line whose first words have a style."""
    return Text.assemble((head, style), rest)
