"""Reward functions for whole runs, in TRL's form; some of them bad on purpose."""

from __future__ import annotations

import os
import time
from typing import Any


def share_of_digits(completions: list[Any], **columns: Any) -> list[float]:
    """Part of the characters that are digits: a signal that even a random model has."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ch.isdigit() for ch in t) / max(1, len(t)) for t in texts]


def raises(completions: list[Any], **columns: Any) -> list[float]:
    raise KeyError("no such column")


def fails_on_even_sums(completions: list[Any], answer: list[Any], **columns: Any) -> list[float]:
    if int(answer[0]) % 2 == 0:
        raise ValueError("even")
    return share_of_digits(completions)


def too_few(completions: list[Any], **columns: Any) -> list[float]:
    return []


def nan(completions: list[Any], **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


def hangs(completions: list[Any], **columns: Any) -> list[float]:
    time.sleep(3600)
    return [0.0] * len(completions)


def forks(completions: list[Any], **columns: Any) -> list[float]:
    if os.fork() == 0:
        time.sleep(3600)
    return [1.0] * len(completions)


def exits(completions: list[Any], **columns: Any) -> list[float]:
    os._exit(3)


def digits_by_half(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[Any]:
    """A step at the middle and one at the end, each worth its part of characters that are digits; a number for what is too short
    for two. (The test's tokenizer is one of characters.)"""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    out: list[Any] = []
    for text, ids in zip(texts, completion_ids, strict=True):
        if len(ids) < 2:
            out.append(0.0)
            continue
        half = len(ids) // 2
        shares = [sum(ch.isdigit() for ch in part) / half for part in (text[:half], text[half:])]
        out.append([(half - 1, shares[0]), (len(ids) - 1, shares[1])])
    return out
