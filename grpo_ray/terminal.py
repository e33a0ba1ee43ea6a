"""The one console of this project. Text of users (prompts, paths, output of models) is printed as it is: no markup, no emoji
codes, no control characters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console
from rich.segment import Segment

from grpo_ray.plain_terminal import one_line, raw_of


class PlainConsole(Console):
    """A console that prints strings literally; styled text is a `Text`. Only its own colours and cursor moves reach the
    terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    @property
    def file(self) -> IO[str]:
        return raw_of(Console.file.fget(self))  # type: ignore[attr-defined]

    @file.setter
    def file(self, new: IO[str]) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(_plain(segment) for segment in buffer)


def _plain(segment: Segment) -> Segment:
    if segment.control:
        return segment
    style = segment.style
    if style is not None and style.link:
        style = style.update_link(None)
    lines = segment.text.split("\n")
    return Segment("\n".join(map(one_line, lines)), style)
