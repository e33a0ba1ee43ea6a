"""Warnings of a run, kept for its report in messages.jsonl: one line each, appended and never overwritten."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from grpo_ray import json_text

log = logging.getLogger(__name__)

FILE = "messages.jsonl"
KEPT = ("warning", "error")
"""Levels of a `MessageEvent` that are kept; others matter only at the moment."""
MAX_CHARS = 4000
"""The most characters of one text."""


@dataclass(frozen=True)
class Message:
    step: int
    """The number of steps done when it was reported."""
    time: float
    """The time in seconds since 1970."""
    level: str
    text: str


class MessageLog:
    """The message log of a run; every start of it appends to the same file."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE

    def add(self, step: int, level: str, text: str) -> None:
        """Append a message. Never raises: a full disk is reported by the records that must be written."""
        if level not in KEPT:
            return
        try:
            with self._path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps(asdict(Message(step, time.time(), level, text[:MAX_CHARS]))) + "\n")
        except OSError as e:
            log.warning("a message is not kept in %s: %s", self._path, e)


def read_messages(run_dir: Path) -> list[Message]:
    """Read the messages in order. A torn line is skipped; without a file there are no messages."""
    path = run_dir / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [message for line in lines if (message := _parse(line)) is not None]


def told_once(messages: Sequence[Message]) -> list[tuple[Message, int]]:
    """Each text where it first occurred, and how often it did."""
    counts: dict[tuple[str, str], int] = {}
    firsts: dict[tuple[str, str], Message] = {}
    for m in messages:
        counts[m.level, m.text] = counts.get((m.level, m.text), 0) + 1
        firsts.setdefault((m.level, m.text), m)
    return [(m, counts[key]) for key, m in firsts.items()]


def _parse(line: str) -> Message | None:
    try:
        record = json_text.read(line)
        return Message(*(kind(record[f.name]) for f, kind in zip(fields(Message), (int, float, str, str), strict=True)))
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
