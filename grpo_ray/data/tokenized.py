"""Templated, tokenized rows: what prompts and demonstrations share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.config.data import DataSource
from grpo_ray.data.sources import Row, Table, map_columns, progress
from grpo_ray.data.templates import Render, Rendered, Template
from grpo_ray.errors import DataError

_CHUNK = 1000


@dataclass(frozen=True)
class LoadReport:
    """What happened to the rows of a source."""

    num_rows: int
    num_too_long: int
    num_in_eval: int
    """The number of rows left out because their prompt is in the evaluation set."""

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.num_too_long - self.num_in_eval


class TokenLists:
    """Lists of token ids, frozen into one flat array: four bytes a token."""

    def __init__(self, lists: Sequence[NDArray[np.int32]]) -> None:
        self._flat = np.concatenate([np.zeros(0, np.int32), *lists])
        self._starts = np.cumsum([0, *(len(ids) for ids in lists)], dtype=np.int64)

    def __getitem__(self, i: int) -> list[int]:
        ids: list[int] = self._flat[self._starts[i] : self._starts[i + 1]].tolist()
        return ids

    def digest(self) -> bytes:
        return hashlib.blake2b(self._flat.tobytes() + self._starts.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class TokenizedRow:
    """One row with its prompt templated and tokenized."""

    row: int
    where: str
    rendered: Rendered
    token_ids: NDArray[np.int32]
    """The prompt's token ids, [N]."""
    prompt: Any
    """The prompt as in the row, before the template: text, or messages."""
    columns: Row
    """The mapped columns, without the prompt; for demonstrations also without the completion."""
    completion: str | None

    def answer_ids(self, tokenizer: Any, template: Template, text: str) -> NDArray[np.int32]:
        """The token ids of an answer to the row, see `answer_ids`. Raises DataError, which names the row."""
        try:
            check_characters(text, "the answer")
            return answer_ids(tokenizer, template, self.rendered, self.token_ids, text)
        except DataError as e:
            raise DataError(f"{self.where}: {e}") from None


def tokenized_rows(
    table: Table, source: DataSource, render: Render, tokenizer: Any, *, demonstrations: bool
) -> Iterator[TokenizedRow]:
    """Every row of a table, in order.

    Raises:
        DataError: a row lacks a required column; names file and line.
    """
    with progress(f"tokenizing {table.label}", len(table.rows)) as advance:
        for start in range(0, len(table.rows), _CHUNK):
            stop = min(start + _CHUNK, len(table.rows))
            parts = []
            for i in range(start, stop):
                where = table.where(i)
                row = map_columns(table.rows[i], source.columns, where)
                prompt, completion, columns = _split(row, where, demonstrations)
                try:
                    rendered = render(prompt, columns)
                    check_characters(rendered.text, "the prompt")
                    parts.append((i, where, rendered, prompt, columns, completion))
                except DataError as e:
                    raise DataError(f"{where}: {e}") from None
            all_ids = tokenize(tokenizer, [rendered for _, _, rendered, *_ in parts])
            for (i, where, rendered, prompt, columns, completion), ids in zip(parts, all_ids, strict=True):
                if not len(ids):
                    raise DataError(f"{where}: the prompt is empty; expected text to continue")
                yield TokenizedRow(table.number(i), where, rendered, ids, prompt, columns, completion)
            advance(stop - start)


def check_characters(text: str, what: str) -> None:
    """Raises DataError for a lone surrogate (JSON's `\\ud83d`), which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        around = text[max(0, e.start - 20) : e.start + 20]
        raise DataError(
            f"{what} holds half of a character, {text[e.start]!a}, at {around!a}: write the whole one, or leave the row out"
        ) from None


def tokenize(tokenizer: Any, rendered: Sequence[Rendered]) -> list[NDArray[np.int32]]:
    """The token ids of each text, [N] each. Something always follows, so none gets the token that ends a text (`add_eos_token`)."""
    out: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(rendered)
    for special in (False, True):
        places = [i for i, r in enumerate(rendered) if r.add_special_tokens is special]
        if places:
            texts = [rendered[i].text for i in places]
            ids = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
            behind = _num_added_behind(tokenizer) if special else 0
            for i, x in zip(places, ids, strict=True):
                out[i] = np.asarray(x[: len(x) - behind], np.int32)
    return out


def _num_added_behind(tokenizer: Any) -> int:
    """The number of special tokens that the tokenizer puts after every text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for behind in range(len(whole) - len(plain) + 1):
        end = len(whole) - behind
        if whole[end - len(plain) : end] == plain:
            return behind
    return 0


def answer_ids(
    tokenizer: Any,
    template: Template,
    prompt: Rendered,
    prompt_ids: NDArray[np.int32],
    text: str,
    *,
    sampled: bool = False,
) -> NDArray[np.int32]:
    """The token ids of an answer, [T], ending with the one that ends it. They are taken from prompt and answer tokenized as one
    text, as in TRL, if the prompt's ids stay the same in it; otherwise the answer is tokenized separately, because sampling has the
    same seam.

    Args:
        sampled: see `Template.answer`.

    Raises:
        DataError: the template has no place for the answer, or no token can end it.
    """
    answer = template.answer(prompt, text, sampled=sampled)
    (whole,) = tokenize(tokenizer, [replace(prompt, text=prompt.text + answer)])
    same = np.array_equal(whole[: len(prompt_ids)], prompt_ids)
    ids = whole[len(prompt_ids) :] if same else tokenizer(answer, add_special_tokens=False)["input_ids"]
    return np.asarray([*ids, template.end.id], np.int32)


def fingerprint(name: str, rows: Sequence[int], columns: Sequence[Row], *token_ids: TokenLists) -> str:
    """A hash of everything that determines a prompt: 32 hexadecimal digits, the same on every machine."""
    h = hashlib.blake2b(name.encode(), digest_size=16)
    h.update(np.asarray(rows, np.int64).tobytes())
    for lists in token_ids:
        h.update(lists.digest())
    for row in columns:
        # Values that JSON doesn't know count by their type: their `repr` may hold an address.
        h.update(json.dumps(row, default=lambda o: type(o).__name__, skipkeys=True).encode())
    return h.hexdigest()


def _split(row: Row, where: str, demonstrations: bool) -> tuple[Any, str | None, Row]:
    """(prompt, completion, other columns)."""
    used = {"prompt", "messages"} if row.get("prompt") is None else {"prompt"}
    prompt = row["prompt"] if row.get("prompt") is not None else row.get("messages")
    if prompt is None and (null := next((name for name in ("prompt", "messages") if name in row), None)):
        raise DataError(f"{where}: column {null!r} is null; leave the row out, or give it text to continue")
    if prompt is None:
        there = ", ".join(map(str, row))
        raise DataError(
            f"{where}: no column 'prompt' or 'messages'; columns there: {there}; "
            "name the one to use: columns: {prompt: NAME}"
        )
    if not isinstance(prompt, str):
        _check_messages(prompt, f"{where}, column {'prompt' if 'messages' not in used else 'messages'!r}")
    if not demonstrations:
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the conversation ends with an assistant's turn; a prompt ends with what is to be answered"
            )
        return prompt, None, {k: v for k, v in row.items() if k not in used}
    completion = row.get("completion")
    if completion is None and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant" and len(prompt) > 1:
        prompt, completion = prompt[:-1], prompt[-1]["content"]
    elif completion is not None:
        completion = completion_text(completion, where, "completion")
    if completion is None:
        raise DataError(
            f"{where}: no completion; expected a column 'completion', or 'messages' that end with an assistant's turn; "
            f"columns there: {', '.join(map(str, row))}"
        )
    return prompt, completion, {k: v for k, v in row.items() if k not in used | {"completion"}}


def completion_text(value: Any, where: str, name: str) -> str:
    """The text of column `name`, which holds text or one assistant message.

    Raises:
        DataError: it holds neither.
    """
    if isinstance(value, str):
        return value
    _check_messages(value, where)
    if len(value) != 1 or value[0]["role"] != "assistant":
        raise DataError(f"{where}: expected {name!r} to be text or one assistant message, got {len(value)} messages")
    text: str = value[0]["content"]
    return text


def _not_text(content: Any) -> list[str]:
    """The types of a message's parts other than text: images, videos, audio."""
    parts = content if isinstance(content, list) else []
    return sorted(
        {str(part["type"]) for part in parts if isinstance(part, dict) and part.get("type", "text") != "text"}
    )


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected text or a list of messages, got {type(messages).__name__} {messages!r:.60}")
    for i, m in enumerate(messages):
        if isinstance(m, dict) and (kinds := _not_text(m.get("content"))):
            raise DataError(f"{where}, message {i}: it has a part of type {', '.join(kinds)}, and only text is trained")
        if not (isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
            raise DataError(f"{where}, message {i}: expected {{role: ..., content: text}}, got {m!r:.80}")
