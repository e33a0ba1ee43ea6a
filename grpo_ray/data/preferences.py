"""Preferences: data sets of pairs, for DPO and reward models, and of answers with a label, for reward models.

    DataSource -> Table -> templated, tokenized prompt + answers -> PairDataset -> Cursor.next() -> Pair -> TrainBatch

Rows are as in TRL: `prompt`, `chosen` and `rejected` (text or messages), `chosen` and `rejected` alone as whole conversations that
share a beginning, or `prompt`, `completion` and `label`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grpo_ray.config.data import DataConfig, DataSource
from grpo_ray.data.prompts import EVAL_SEED_OFFSET, check_any_left, refuse_if_asked
from grpo_ray.data.sources import Read, Row, Table, load_table, map_columns
from grpo_ray.data.templates import Render, make_template
from grpo_ray.data.tokenized import LoadReport, TokenizedRow, TokenLists, completion_text, fingerprint, tokenized_rows
from grpo_ray.errors import DataError
from grpo_ray.types import Sample, TrainBatch, TrainSample, VersionSpan

Kept = tuple[TokenizedRow, tuple[NDArray[np.int32], ...], float]
"""A row, its answers and its target."""


@dataclass(frozen=True)
class Pair:
    """One row: two answers to a prompt, the better one first, or one answer with its label."""

    id: str
    """The id `<data set>/<epoch>/<row>`."""
    index: int
    """The index of the row in the data set."""
    prompt_ids: list[int]
    """The prompt's token ids, [N], exactly those that reinforcement learning would sample from."""
    answers: tuple[list[int], ...]
    """The answers' token ids, [T] each, ending with the token that ends the turn: chosen and rejected, or the single one."""
    target: float
    """The margin by which the first answer should be better, or the label of the single one."""


class PairDataset:
    """The preferences of one source, tokenized; created by `load_pairs`."""

    def __init__(self, name: str, kept: Sequence[Kept], report: LoadReport) -> None:
        self.name = name
        self.report = report
        self._rows = [row.row for row, _, _ in kept]
        self._targets = [target for _, _, target in kept]
        self._prompts = TokenLists([row.token_ids for row, _, _ in kept])
        self._answers = [TokenLists(answers) for answers in zip(*(answers for _, answers, _ in kept), strict=True)]
        columns = [{"target": target} for target in self._targets]
        self.fingerprint = fingerprint(name, self._rows, columns, self._prompts, *self._answers)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int, epoch: int) -> Pair:
        return Pair(
            id=f"{self.name}/{epoch}/{self._rows[index]}",
            index=index,
            prompt_ids=self._prompts[index],
            answers=tuple(lists[index] for lists in self._answers),
            target=self._targets[index],
        )

    def __iter__(self) -> Iterator[Pair]:
        return (self.item(i, 0) for i in range(len(self)))


@dataclass(frozen=True)
class PairSets:
    train: PairDataset
    eval: dict[str, PairDataset]
    """Evaluation sets by name, '' for a single one."""


def load_pairs(
    data: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    max_length: int,
    labelled: bool = False,
    use_margin: bool = False,
    highest: float = math.inf,
    read: Read = load_table,
) -> PairSets:
    """Read, template and tokenize `data.train` and `data.eval`.

    Args:
        seed: the seed of generators without one in their `args`.
        max_length: the largest number of tokens of the prompt and either answer.
        labelled: whether rows are single answers with a label.
        use_margin: whether pairs have a column `margin`.
        highest: the largest label: 1 if labels are probabilities, which start at 0.
        read: the function that reads rows.

    Raises:
        DataError: the data are unusable; names source, line or row, and the fix.
    """
    render = make_template(data.template, tokenizer, data.system, data.chat_template_kwargs)
    _ = render.end  # Without one no row is at fault.

    def load(name: str, table: Table, source: DataSource, held_out: frozenset[str]) -> tuple[PairDataset, set[str]]:
        kept, texts = [], set()
        num_too_long = num_in_eval = 0
        for row, answers, target in _rows(table, source, render, tokenizer, labelled, use_margin):
            if highest < math.inf and not 0 <= target <= highest:
                raise DataError(
                    f"{row.where}: the label is {target:g}, and reward_model.loss bce takes labels from 0 to 1; scale them, or "
                    "use mse"
                )
            if row.rendered.text in held_out:
                num_in_eval += 1
                continue
            ids = [row.answer_ids(tokenizer, render, text) for text in answers]
            if len({x.tobytes() for x in ids}) < len(ids):
                raise DataError(f"{row.where}: chosen and rejected are the same text; leave the row out")
            length = len(row.token_ids) + max(map(len, ids))
            if length > max_length:
                refuse_if_asked(data, f"{row.where}: prompt and answer are {length} tokens", max_length, "max_length")
                num_too_long += 1
                continue
            kept.append((row, tuple(ids), target))
            texts.add(row.rendered.text)
        report = LoadReport(len(table.rows), num_too_long, num_in_eval)
        check_any_left(report, table, max_length, "max_length")
        return PairDataset(name, kept, report), texts

    evaluation, held_out = {}, set[str]()
    for name, source in data.eval_sets.items():
        table = read(source, seed=seed + EVAL_SEED_OFFSET)
        evaluation[name], texts = load(f"eval-{name or table.name}", table, source, frozenset())
        held_out |= texts
    table = read(data.train, seed=seed)
    train, _ = load(table.name, table, data.train, frozenset(held_out) if data.exclude_eval else frozenset())
    return PairSets(train, evaluation)


def pair_batch(
    step: int,
    pairs: Sequence[Pair],
    references: Mapping[int, Sequence[float]] | None = None,
    *,
    read_last: bool = False,
) -> TrainBatch:
    """The answers as samples, those of a pair one after the other.

    Args:
        step: the number of the step.
        pairs: the pairs of one optimizer step.
        references: index of a pair -> log-probability of each of its answers under the reference.
        read_last: whether the model also reads the last token of an answer, which otherwise is only predicted.
    """
    rows, samples = [], []
    for group, pair in enumerate(pairs):
        for place, answer in enumerate(pair.answers):
            ids = np.asarray([*answer, answer[-1]] if read_last else answer, dtype=np.int32)
            prompt = np.asarray(pair.prompt_ids, dtype=np.int32)
            nothing = np.zeros(len(ids), dtype=np.float32)
            rows.append(Sample(pair.id, place, prompt, ids, nothing, (VersionSpan(step - 1, 0, len(ids)),), "stop", ""))
            samples.append(
                TrainSample(
                    ref=rows,
                    row=len(rows) - 1,
                    prompt_id=pair.id,
                    index=place,
                    num_prompt_tokens=len(prompt),
                    num_tokens=len(ids),
                    group=group,
                    target=pair.target,
                    ref_logps=None if references is None else references[pair.index][place],
                )
            )
    return TrainBatch(step=step, samples=samples, temperature=1.0)


def _rows(
    table: Table, source: DataSource, render: Render, tokenizer: Any, labelled: bool, use_margin: bool
) -> Iterator[tuple[TokenizedRow, tuple[str, ...], float]]:
    if labelled:
        for row in tokenized_rows(table, source, render, tokenizer, demonstrations=True):
            assert row.completion is not None
            yield row, (row.completion,), _number(row, "label")
        return
    explicit = replace(table, rows=_explicit(table, source))
    for row in tokenized_rows(explicit, source, render, tokenizer, demonstrations=False):
        answers = tuple(_answer(row, name) for name in ("chosen", "rejected"))
        yield row, answers, _number(row, "margin") if use_margin else 0.0


def _explicit(table: Table, source: DataSource) -> Sequence[Row]:
    """Rows with a prompt: one without gets what its two conversations have in common, as in TRL."""
    if "prompt" in source.columns or not len(table.rows) or "prompt" in table.rows[0]:
        return table.rows
    out = []
    for i, raw in enumerate(table.rows):
        row = map_columns(raw, source.columns, table.where(i))
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if not isinstance(chosen, list) or not isinstance(rejected, list):
            raise DataError(
                f"{table.where(i)}: no column 'prompt', and chosen and rejected are no conversations that could begin with it; "
                "name the one to use: columns: {prompt: NAME}"
            )
        same = 0
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
        out.append({**raw, "prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]})
    return out


def _answer(row: TokenizedRow, name: str) -> str:
    if name not in row.columns:
        raise DataError(
            f"{row.where}: no column {name!r}; a pair has prompt, chosen and rejected; columns there: "
            f"{', '.join(map(str, row.columns))}; name the one to use: columns: {{{name}: NAME}}"
        )
    return completion_text(row.columns[name], row.where, name)


def _number(row: TokenizedRow, name: str) -> float:
    value = row.columns.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{row.where}: expected a number in column {name!r}, got {value!r:.60}")
    return float(value)
