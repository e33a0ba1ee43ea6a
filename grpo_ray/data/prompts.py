"""Data sets of prompts, for reinforcement learning, and of demonstrations, for SFT.

    DataSource -> Table -> mapped columns -> templated text -> token ids -> PromptDataset -> Cursor.next() -> Prompt

Rows that are too long or also in the evaluation set are left out here and counted in `LoadReport`; the rest never
changes, as its `fingerprint` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.config.data import DataConfig, DataSource
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.sources import Read, Row, Table, load_table
from grpo_ray.data.templates import Render, Rendered, make_template
from grpo_ray.data.tokenized import LoadReport, TokenizedRow, TokenLists, fingerprint, tokenized_rows
from grpo_ray.errors import DataError
from grpo_ray.types import Prompt

__all__ = [
    "Cursor",
    "LoadReport",
    "PromptDataset",
    "PromptSets",
    "SftDataset",
    "SftExample",
    "load_demonstrations",
    "load_prompts",
]

EVAL_SEED_OFFSET = 1 << 31
"""The offset of the evaluation's seeds: reasoning-gym samples row i from `seed + i`, so without a gap, train and eval of one task
would share most rows."""


@dataclass(frozen=True)
class SftExample:
    """One demonstration. The loss is on the completion alone."""

    id: str
    """The id `<data set>/<epoch>/<row>`."""
    prompt_ids: list[int]
    """The prompt's token ids, [N], exactly those that reinforcement learning would sample from."""
    completion_ids: list[int]
    """The completion's token ids, [T], ending with the token that ends the turn; see `grpo_ray.data.tokenized.answer_ids`."""


class PromptDataset:
    """The prompts of one source, tokenized; created by `load_prompts`."""

    def __init__(self, name: str, kept: list[TokenizedRow], report: LoadReport) -> None:
        self.name = name
        self.report = report
        self._rows = [k.row for k in kept]
        self._rendered: list[Rendered] = [k.rendered for k in kept]
        self._columns: list[Row] = [k.columns for k in kept]
        self._asked = [k.prompt for k in kept]
        self._token_ids = TokenLists([k.token_ids for k in kept])
        self.column_names = tuple(dict.fromkeys(name for row in self._columns for name in row))
        """The columns of all its rows."""
        self.fingerprint = fingerprint(name, self._rows, self._columns, self._token_ids)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int, epoch: int) -> Prompt:
        """The index-th kept row, as the prompt of an epoch."""
        rendered, columns = self._rendered[index], self._columns[index]
        if len(columns) < len(self.column_names):
            # Columns as Arrow has them, and so TRL's data sets.
            columns = dict.fromkeys(self.column_names) | columns
        return Prompt(
            id=f"{self.name}/{epoch}/{self._rows[index]}",
            token_ids=self._token_ids[index],
            text=rendered.text,
            messages=rendered.messages,
            columns=columns,
            asked=self._asked[index],
        )

    @property
    def rows_of_columns(self) -> list[Row]:
        """The own columns of each kept row."""
        return self._columns

    def conversation(self, index: int) -> list[dict[str, Any]]:
        """The conversation or question of the index-th kept row, without anything that the template adds."""
        asked = self._asked[index]
        return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked

    def __iter__(self) -> Iterator[Prompt]:
        """Every prompt in the source's order, as in epoch 0, for evaluation."""
        return (self.item(i, 0) for i in range(len(self)))


class SftDataset:
    """The demonstrations of one source, tokenized; created by `load_demonstrations`."""

    def __init__(
        self,
        name: str,
        rows: list[int],
        prompt_ids: list[NDArray[np.int32]],
        completion_ids: list[NDArray[np.int32]],
        report: LoadReport,
    ) -> None:
        self.name = name
        self.report = report
        self._rows = rows
        self._prompt_ids = TokenLists(prompt_ids)
        self._completion_ids = TokenLists(completion_ids)
        self.fingerprint = fingerprint(name, rows, [], self._prompt_ids, self._completion_ids)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int, epoch: int) -> SftExample:
        """The index-th kept row, as the example of an epoch."""
        example_id = f"{self.name}/{epoch}/{self._rows[index]}"
        return SftExample(example_id, self._prompt_ids[index], self._completion_ids[index])

    def __iter__(self) -> Iterator[SftExample]:
        return (self.item(i, 0) for i in range(len(self)))


@dataclass(frozen=True)
class PromptSets:
    train: PromptDataset
    eval: dict[str, PromptDataset]
    """Evaluation sets by name, '' for a single one. Ids start with `eval-`: no two sets share a prompt id."""


def load_prompts(
    data: DataConfig, tokenizer: Any, *, seed: int, max_context: int | None = None, read: Read = load_table
) -> PromptSets:
    """Read, template and tokenize `data.train` and `data.eval`.

    Args:
        seed: the seed of generators without one in their `args`.
        max_context: the model's context length in tokens; a prompt must leave room for one more.
        read: the function that reads rows.

    Raises:
        DataError: the data are unusable; names source, line or row, and the fix.
    """
    evaluation = load_eval_prompts(data, tokenizer, seed=seed, max_context=max_context, read=read)
    load = _loader(data, tokenizer, max_context)
    table = read(data.train, seed=seed)
    return PromptSets(
        load(table.name, table, data.train, _texts_of(evaluation) if data.exclude_eval else frozenset()), evaluation
    )


def load_eval_prompts(
    data: DataConfig, tokenizer: Any, *, seed: int, max_context: int | None = None, read: Read = load_table
) -> dict[str, PromptDataset]:
    """The prompts of `data.eval` alone, by name. See `load_prompts`."""
    load = _loader(data, tokenizer, max_context)
    evaluation = {}
    for name, source in data.eval_sets.items():
        table = read(source, seed=seed + EVAL_SEED_OFFSET)
        evaluation[name] = load(f"eval-{name or table.name}", table, source, frozenset())
    return evaluation


def trained_on(data: DataConfig, tokenizer: Any, evaluation: Mapping[str, PromptDataset], *, seed: int) -> int:
    """The number of evaluation prompts that are also among the rows of `data.train`.

    Raises:
        DataError: the rows can't be read.
    """
    render = make_template(data.template, tokenizer, data.system, data.chat_template_kwargs)
    rows = tokenized_rows(load_table(data.train, seed=seed), data.train, render, tokenizer, demonstrations=False)
    trained = {row.rendered.text for row in rows}
    return sum(prompt.text in trained for prompts in evaluation.values() for prompt in prompts)


def _texts_of(evaluation: Mapping[str, PromptDataset]) -> frozenset[str]:
    return frozenset(p.text for prompts in evaluation.values() for p in prompts)


def _loader(
    data: DataConfig, tokenizer: Any, max_context: int | None
) -> Callable[[str, Table, DataSource, frozenset[str]], PromptDataset]:
    """The function (name, table, its source, texts to leave out) -> the prompts."""
    render = make_template(data.template, tokenizer, data.system, data.chat_template_kwargs)
    limit, option = data.max_prompt_length, "data.max_prompt_length"
    if max_context is not None and max_context <= limit:
        limit, option = max_context - 1, "what the model's context leaves"

    def load(name: str, table: Table, source: DataSource, held_out: frozenset[str]) -> PromptDataset:
        kept = []
        num_too_long = num_in_eval = 0
        for row in tokenized_rows(table, source, render, tokenizer, demonstrations=False):
            if row.rendered.text in held_out:
                num_in_eval += 1
            elif len(row.token_ids) > limit:
                refuse_if_asked(data, f"{row.where}: the prompt is {len(row.token_ids)} tokens", limit, option)
                num_too_long += 1
            else:
                kept.append(row)
        report = LoadReport(len(table.rows), num_too_long, num_in_eval)
        check_any_left(report, table, limit, option)
        return PromptDataset(name, kept, report)

    return load


def load_demonstrations(
    data: DataConfig, tokenizer: Any, *, seed: int, max_length: int, read: Read = load_table
) -> SftDataset:
    """Read, template and tokenize `data.train` as demonstrations.

    A row has `prompt` and `completion` (text or messages), or `messages` whose last turn is the completion.
    `data.eval`, where given, is only kept out of it (data.exclude_eval): its rows need no completion.

    Args:
        seed: the seed of generators without one in their `args`.
        max_length: the largest number of tokens of prompt and completion together.
        read: the function that reads rows.

    Raises:
        DataError: the data are unusable; names source, line or row, and the fix.
    """
    render = make_template(data.template, tokenizer, data.system, data.chat_template_kwargs)
    _ = render.end  # Without one no row is at fault.
    sources = data.eval_sets.values() if data.exclude_eval else ()
    held_out = frozenset(text for source in sources for text in _texts(source, render, tokenizer, seed, read))
    table = read(data.train, seed=seed)
    rows, prompts, completions = [], [], []
    num_too_long = num_in_eval = 0
    for row in tokenized_rows(table, data.train, render, tokenizer, demonstrations=True):
        if row.rendered.text in held_out:
            num_in_eval += 1
            continue
        assert row.completion is not None
        ids = row.answer_ids(tokenizer, render, row.completion)
        length = len(row.token_ids) + len(ids)
        if length > max_length:
            refuse_if_asked(data, f"{row.where}: prompt and completion are {length} tokens", max_length, "max_length")
            num_too_long += 1
            continue
        rows.append(row.row)
        prompts.append(row.token_ids)
        completions.append(ids)
    report = LoadReport(len(table.rows), num_too_long, num_in_eval)
    check_any_left(report, table, max_length, "max_length")
    return SftDataset(table.name, rows, prompts, completions, report)


def _texts(source: DataSource, render: Render, tokenizer: Any, seed: int, read: Read) -> Iterator[str]:
    table = read(source, seed=seed + EVAL_SEED_OFFSET)
    return (row.rendered.text for row in tokenized_rows(table, source, render, tokenizer, demonstrations=False))


def refuse_if_asked(data: DataConfig, what: str, limit: int, option: str) -> None:
    if data.long_prompts == "error":
        raise DataError(
            f"{what}, more than {option} ({limit}); raise it, shorten the row, or set data.long_prompts=drop"
        )


def check_any_left(report: LoadReport, table: Table, limit: int, option: str) -> None:
    if not report.num_kept:
        raise DataError(
            f"{table.label}: none of {'its' if table.numbers is None else 'the'} {report.num_rows} rows "
            f"{'' if table.numbers is None else 'that were looked at '}is left: {report.num_too_long} are longer than "
            f"{option} ({limit} tokens), {report.num_in_eval} are also in the evaluation set; "
            "raise the limit, or set data.exclude_eval=false"
        )
