"""Decontamination as in DeepSeek-R1 (2501.12948): a training row is dropped if any n consecutive words, n = 10, also occur in a
test prompt.

    test tables -> hashes of their n-grams -> a set;  training table -> rows whose prompt holds one of them

Texts are compared as a reader sees them: without case, accents, zero-width signs, emphasis and punctuation, and with full-width
letters as ordinary ones. In scripts without spaces, a Chinese character counts as a word, and one of kana, Thai, Lao, Khmer or
Burmese, of which a word takes several, as a third of one.

A test prompt of fewer than n words is searched as a whole, anywhere in a row, if it has at least SHORTEST words: `Yes` would be in
every row, and counts only if it is the whole row.

Only the hashes of the test sets' n-grams are kept in memory, 64 bits each. Two n-grams with one hash could cost a good row
(less than one in ten million for 10^4 test prompts and 10^6 training rows); they never let a bad one pass.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo_ray.data.plain_text import bound_marks
from grpo_ray.data.sources import Row, Table, map_columns, progress
from grpo_ray.errors import DataError
from grpo_ray.files import written_aside

SENTENCE_MARKS = ".,;:!?\"'`()[]{}\u3001\u3002\u300c\u300d\u300e\u300f\u300a\u300b\u3010\u3011"
"""The signs stripped from both ends of a word. Mathematical signs stay: without them `7 + 5` would be `7 - 5`."""
SHORTEST = 3
"""The number of words from which a whole test prompt is searched inside rows."""
_EMPHASIS = "*_~"
_SAME = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        "\u2044": "/",
    }
)
# Unicode's default ignorable code points, and control characters that are no white space.
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_ACCENTS = re.compile("[\u0300-\u036f]+")
_CHINESE = "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_THIRDS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3100-\u312f\u31f0-\u31ff"
_UNSPACED = re.compile(f"([{_CHINESE}{_THIRDS}])")
_THIRD = re.compile(f"[{_THIRDS}]")
_WORD_WEIGHT = 3


@dataclass(frozen=True)
class Contaminated:
    """A training row that shares words with a test prompt."""

    row: int
    shared: str
    """The first n words, normalised, that the row shares, or a whole test prompt of fewer."""


@dataclass
class TestPrompts:
    """The test prompts that rows are compared with. Python's own hash differs from process to process: do not store this."""

    grams: set[int] = field(default_factory=set)
    """The hashes of all n-grams."""
    short: dict[str, set[int]] = field(default_factory=dict)
    """First word of each prompt that is shorter than n -> the word counts of such prompts."""
    short_hashes: set[int] = field(default_factory=set)
    tiny_hashes: set[int] = field(default_factory=set)
    """The hashes of prompts of fewer than SHORTEST words."""

    def __len__(self) -> int:
        return len(self.grams) + len(self.short_hashes) + len(self.tiny_hashes)

    def update(self, other: TestPrompts) -> None:
        self.grams |= other.grams
        self.short_hashes |= other.short_hashes
        self.tiny_hashes |= other.tiny_hashes
        for word, sizes in other.short.items():
            self.short.setdefault(word, set()).update(sizes)


def words_of(text: str) -> list[str]:
    """The normalised words of a text (see the module docstring); characters of scripts without spaces are words of their own."""
    plain = _UNSEEN.sub("", text).casefold() if text.isascii() else _plain(text)
    return [word for piece in plain.split() if (word := _bare(piece))]


def _plain(text: str) -> str:
    seen = bound_marks(_UNSEEN.sub("", text).translate(_SAME))
    # Combining marks are dropped one by one, and what case folding splits is composed again.
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", seen).casefold())
    return _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFKC", _ACCENTS.sub("", folded)).translate(_SAME))


def _bare(word: str) -> str:
    bare = word.strip(SENTENCE_MARKS)
    return bare.strip(SENTENCE_MARKS + _EMPHASIS) or bare


def _weight(word: str) -> int:
    return 1 if len(word) == 1 and word > "\u0dff" and _THIRD.match(word) else _WORD_WEIGHT


def size_of(words: Sequence[str]) -> float:
    """The size in words, of which a character may be a third."""
    return sum(map(_weight, words)) / _WORD_WEIGHT


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """Every n consecutive words. Fewer than n words form a single n-gram."""
    weights = [_weight(word) for word in words]
    end = weight = 0
    for start in range(len(words)):
        while weight < n * _WORD_WEIGHT and end < len(words):
            weight += weights[end]
            end += 1
        if weight < n * _WORD_WEIGHT and start:
            return
        yield tuple(words[start:end])
        weight -= weights[start]


def ngram_hashes(texts: Iterable[str], n: int) -> TestPrompts:
    """The test prompts from all the texts; those of fewer than n words are kept whole."""
    known = TestPrompts()
    for words in map(words_of, texts):
        size = size_of(words)
        if size >= n:
            known.grams.update(map(hash, ngrams(words, n)))
        elif size >= SHORTEST:
            known.short.setdefault(words[0], set()).add(len(words))
            known.short_hashes.add(hash(tuple(words)))
        elif words:
            known.tiny_hashes.add(hash(tuple(words)))
    return known


def shared_words(text: str, known: TestPrompts, n: int) -> str | None:
    """The first n-gram of the text that is known, else the first short test prompt in it, else None."""
    words = words_of(text)
    if size_of(words) >= n:
        for gram in ngrams(words, n):
            if hash(gram) in known.grams:
                return " ".join(gram)
    for start, word in enumerate(words):
        for size in sorted(known.short.get(word, ())):
            piece = tuple(words[start : start + size])
            if hash(piece) in known.short_hashes:
                return " ".join(piece)
    return " ".join(words) if words and hash(tuple(words)) in known.tiny_hashes else None


def prompt_texts(table: Table, column: str | None) -> Iterator[str]:
    """The text of each row that is compared: its prompt, or everything but the answers of its conversation.

    Args:
        column: the column with the text; None: `prompt`, else `messages`.

    Raises:
        DataError: a row lacks it.
    """
    with progress(f"comparing {table.label}", len(table.rows)) as advance:
        for i in range(len(table.rows)):
            yield _prompt_text(table.rows[i], column, table.where(i))
            advance(1)


def find_contaminated(train: Table, column: str | None, known: TestPrompts, n: int) -> list[Contaminated]:
    """The rows of `train` that share words with test prompts, in order."""
    texts = enumerate(prompt_texts(train, column))
    return [Contaminated(row, shared) for row, text in texts if (shared := shared_words(text, known, n)) is not None]


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write the rows atomically, and return their number."""
    count = 0
    try:
        with written_aside(path) as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
                count += 1
    except OSError as e:
        raise DataError(f"{path} can't be written ({e}); name another place with --out") from None
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
