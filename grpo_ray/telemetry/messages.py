"""What a run warned of, kept for its report: messages.jsonl, one line each, added to and never written over."""

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
"""Levels of a `MessageEvent`; what is only for the moment is not kept."""
MAX_CHARS = 4000
"""Of one text."""


@dataclass(frozen=True)
class Message:
    step: int
    """Steps done when it was told."""
    time: float
    """Seconds since 1970."""
    level: str
    text: str


class MessageLog:
    """A run's; every life of it adds to the same file."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE

    def add(self, step: int, level: str, text: str) -> None:
        """Never raises: a full disk is told by what has to be written."""
        if level not in KEPT:
            return
        try:
            with self._path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(json.dumps(asdict(Message(step, time.time(), level, text[:MAX_CHARS]))) + "\n")
        except OSError as e:
            log.warning("a message is not kept in %s: %s", self._path, e)


def read_messages(run_dir: Path) -> list[Message]:
    """In the order in which they were told. A torn line is passed over; no file, no messages."""
    path = run_dir / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return [message for line in lines if (message := _parse(line)) is not None]


def told_once(messages: Sequence[Message]) -> list[tuple[Message, int]]:
    """Each text where it first came, and how often it did."""
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
