"""Untrusted text on a terminal or in a log: text of a file, a model or another machine moves no cursor and sets no clipboard."""

from __future__ import annotations

import io
import re
import sys
import traceback
from types import TracebackType
from typing import Any, TextIO

from grpo_ray.secrets import hide_secrets

_SEQUENCES = re.compile(
    # OSC, DCS, PM, APC, SOS up to their terminator, if there is one; then CSI; then two-character sequences.
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x90\x98\x9c-\x9f\n]{0,4096}+(?:\x07|\x1b\\|\x9c)"
    r"|(?:\x1b\[|\x9b)[0-?]{0,64}[ -/]{0,16}[@-~]"
    r"|\x1b[ -/]{0,16}[0-Z\\^-~]"
)
# C0 except newline and tab, DEL, C1; separators that count as newlines; characters that change the direction of text or are
# invisible.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def clean(text: str) -> str:
    """`text` without control characters and sequences; newlines and tabs stay, and a character that would overwrite a line
    starts a new one."""
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _CONTROLS.sub("", _SEQUENCES.sub("", text))


def one_line(text: str) -> str:
    """`clean` text without newlines."""
    return clean(text).replace("\n", " ").replace("\t", " ")


class CleanStream(io.TextIOBase):
    """A stream whose text goes through `clean` before another one: for prints, logging, warnings and tracebacks alike."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        self.raw.write(clean(text))
        return len(text)

    def flush(self) -> None:
        self.raw.flush()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def fileno(self) -> int:
        return self.raw.fileno()

    def writable(self) -> bool:
        return True

    def reconfigure(self, **options: Any) -> None:
        if isinstance(self.raw, io.TextIOWrapper):
            self.raw.reconfigure(**options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.raw.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.raw.errors


def clean_streams() -> None:
    """Clean everything that this process writes as text from now on; unexpected errors show no secrets."""
    sys.stdout, sys.stderr = _cleaned(sys.stdout), _cleaned(sys.stderr)
    sys.excepthook = _tell_unexpected


def raw_of(stream: TextIO) -> TextIO:
    """The underlying stream, for code that writes control sequences of its own."""
    return stream.raw if isinstance(stream, CleanStream) else stream


def say(text: str, *, error: bool = False) -> None:
    """Print one line on stdout, or on stderr."""
    stream = sys.stderr if error else sys.stdout
    stream.write(f"{clean(text)}\n")
    stream.flush()


def _cleaned(stream: Any) -> Any:
    # Before its libraries are imported a process may have no streams at all.
    return stream if stream is None or isinstance(stream, CleanStream) else CleanStream(stream)


def _tell_unexpected(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    sys.stderr.write(hide_secrets("".join(traceback.format_exception(kind, error, where))))
