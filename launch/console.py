"""The console that commands print with."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from grpo_ray.terminal import PlainConsole


def plain_console(**options: Any) -> PlainConsole:
    """See `PlainConsole`."""
    return PlainConsole(**options)


def headed(head: str, style: str, rest: str) -> Text:
    """A line whose first words have a style."""
    return Text.assemble((head, style), rest)
