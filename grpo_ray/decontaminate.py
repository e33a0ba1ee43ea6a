"""Training rows that share words with a test set are found and left out, as DeepSeek-R1 does it (2501.12948): a row goes
when any n words in a row, n = 10, stand in a test prompt too.

    test tables -> hashes of their n-grams -> a set;  training table -> rows whose prompt holds one of them

Only the hashes of the test sets' n-grams are kept in memory, 64 bits each. Two n-grams with one hash could cost a good row
(less than one in ten million for 10^4 test prompts and 10^6 training rows); they never let a bad one pass.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.data import Row, Table, map_columns, progress
from grpo_ray.errors import DataError

SENTENCE_MARKS = ".,;:!?\"'`()[]{}\u2026\u201c\u201d\u2018\u2019"
"""Stripped from both ends of a word. Signs stay: without them `7 + 5` would be `7 - 5`."""


@dataclass(frozen=True)
class Contaminated:
    """A training row that shares words with a test prompt."""

    row: int
    shared: str
    """The first n words, normalised, that it shares; all its words if it has fewer."""


def words_of(text: str) -> list[str]:
    """Between white space, lower-case, without the marks of a sentence."""
    stripped = (word.strip(SENTENCE_MARKS) for word in text.casefold().split())
    return [word for word in stripped if word]


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every n words in a row. Of fewer than n words: all of them as one, so that a short text is compared whole."""
    if len(words) < n:
        if words:
            yield tuple(words)
        return
    for start in range(len(words) - n + 1):
        yield tuple(words[start : start + n])


def ngram_hashes(texts: Iterable[str], n: int) -> set[int]:
    """Of all the texts together. Python's own hash differs from process to process: not to be stored."""
    return {hash(gram) for text in texts for gram in ngrams(words_of(text), n)}


def shared_words(text: str, known: set[int], n: int) -> str | None:
    """The first n-gram of the text that is known."""
    return next((" ".join(gram) for gram in ngrams(words_of(text), n) if hash(gram) in known), None)


def prompt_texts(table: Table, column: str | None) -> Iterator[str]:
    """What is compared of each row: its prompt, or all but the answers of its conversation.

    Args:
        column: where it is; None: `prompt`, else `messages`.

    Raises:
        DataError: a row without it.
    """
    with progress(f"comparing {table.label}", len(table.rows)) as advance:
        for i in range(len(table.rows)):
            yield _prompt_text(table.rows[i], column, table.where(i))
            advance(1)


def find_contaminated(train: Table, column: str | None, known: set[int], n: int) -> list[Contaminated]:
    """The rows of `train` with an n-gram whose hash is known, in order."""
    texts = enumerate(prompt_texts(train, column))
    return [Contaminated(row, shared) for row, text in texts if (shared := shared_words(text, known, n)) is not None]


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write all rows or nothing; how many they are."""
    aside = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with aside.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as e:
        raise DataError(f"{path} can't be written ({e}); name another place with --out") from None
    finally:
        aside.unlink(missing_ok=True)
    return count


def _prompt_text(row: Row, column: str | None, where: str) -> str:
    mapped = map_columns(row, {"prompt": column} if column else {}, where)
    prompt: Any = mapped["prompt"] if mapped.get("prompt") is not None else mapped.get("messages")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
        return "\n".join(m["content"] for m in prompt if m.get("role") != "assistant")
    raise DataError(
        f"{where}: no text in {f'column {column!r}' if column else 'column prompt or messages'}; "
        f"columns there: {', '.join(map(str, row))}; name the one that holds the prompt with --column"
    )
