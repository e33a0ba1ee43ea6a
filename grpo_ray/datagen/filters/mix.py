"""Mix of selected samples and other demonstrations at a ratio, decontaminated against test sets: the rows that SFT trains on.

Each row has TRL's conversational form, `prompt` and `completion` as messages, so that `trl sft`, `load_dataset("json", ..)` and
`grpo-ray sft` all read the file as it is. Its other columns name its origin.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.config.data import DataSource
from grpo_ray.data.decontaminate import TestPrompts, find_contaminated, ngram_hashes, prompt_texts, write_jsonl
from grpo_ray.data.sources import Table, load_table, map_columns
from grpo_ray.datagen.filters.config import MixConfig
from grpo_ray.datagen.filters.select import Selection, select
from grpo_ray.errors import DataError
from grpo_ray.run.sample_files import read_samples

Row = dict[str, Any]


@dataclass(frozen=True)
class MixReport:
    """The composition of the data."""

    num_rows: int
    composition: dict[str, int]
    """The number of rows by part and value of the column `group_by`, e.g. `samples/add`."""
    left_out: dict[str, int]
    """The number of samples left out, by reason."""
    num_samples: int
    """The number of samples that were considered."""
    num_chosen: int
    """The number of samples that passed, before the ratio."""
    num_contaminated: int


def make_mix(config: MixConfig, target: Path) -> MixReport:
    """Write the rows as JSONL, all or nothing, in an order that `config.seed` decides.

    Raises:
        DataError: there is nothing to mix, or nothing is left.
    """
    selections = [select(read_samples(Path(s.path)), s, seed=config.seed) for s in config.samples]
    left_out: Counter[str] = sum((s.left_out for s in selections), Counter())
    known = _known(config)
    chosen, dirty = _clean([row for s in selections for row in s.rows], known, config.ngram)
    other, dirty_too = _clean(
        [row for source in config.other for row in _others(source, config.seed)], known, config.ngram
    )
    if not chosen and not other:
        raise DataError(_nothing(selections, left_out))
    rng = random.Random(config.seed)
    rows = _at_ratio(chosen, other, config.ratio, rng)
    rng.shuffle(rows)
    rows = rows[: config.max_rows]
    # As text: rows of different tasks have columns of different types, which do not fit in one table.
    write_jsonl(target, ({**row, "columns": json.dumps(row["columns"], ensure_ascii=False)} for row in rows))
    return MixReport(
        num_rows=len(rows),
        composition=dict(sorted(Counter(_kind(row, config.group_by) for row in rows).items())),
        left_out=dict(left_out.most_common()),
        num_samples=sum(s.num_samples for s in selections),
        num_chosen=sum(s.num_kept for s in selections),
        num_contaminated=dirty + dirty_too,
    )


def _at_ratio(chosen: list[Row], other: list[Row], ratio: float | None, rng: random.Random) -> list[Row]:
    """The most rows of both that keep `ratio` of the first for one of the second."""
    if ratio is None or not chosen or not other:
        return [*chosen, *other]
    num_chosen = min(len(chosen), round(len(other) * ratio))
    num_other = min(len(other), max(1, round(num_chosen / ratio)))
    return [*rng.sample(chosen, num_chosen), *rng.sample(other, num_other)]


def _others(source: DataSource, seed: int) -> list[Row]:
    table = load_table(source, seed=seed)
    out = []
    for i, row in enumerate(table.rows):
        where = table.where(i)
        mapped = map_columns(row, source.columns, where)
        prompt, completion = mapped.pop("prompt", None), mapped.pop("completion", None)
        messages = mapped.pop("messages", None)
        if completion is None and isinstance(messages, list) and len(messages) > 1:
            prompt, completion = messages[:-1], messages[-1:]
        if prompt is None or completion is None:
            raise DataError(
                f"{where}: no demonstration; expected columns 'prompt' and 'completion', or 'messages' that end with the "
                f"assistant's turn; columns there: {', '.join(map(str, row))}"
            )
        out.append(
            {
                "prompt": _messages(prompt, "user"),
                "completion": _messages(completion, "assistant"),
                "source": table.name,
                "prompt_id": f"{table.name}/0/{i}",
                "index": 0,
                "model_sha256": "",
                "columns": mapped,
            }
        )
    return out


def _messages(text: Any, role: str) -> list[Row]:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _known(config: MixConfig) -> TestPrompts:
    tables = [load_table(source, seed=config.seed) for source in config.decontaminate]
    return ngram_hashes(itertools.chain.from_iterable(prompt_texts(table, None) for table in tables), config.ngram)


def _clean(rows: list[Row], known: TestPrompts, n: int) -> tuple[list[Row], int]:
    if not known:
        return rows, 0
    found = {c.row for c in find_contaminated(Table("mix", "the mix", rows), None, known, n)}
    return [row for i, row in enumerate(rows) if i not in found], len(found)


def _kind(row: Row, column: str | None) -> str:
    of = row["columns"].get(column) if column else None
    return row["source"] if of is None else f"{row['source']}/{of}"


def _nothing(selections: list[Selection], left_out: Counter[str]) -> str:
    if not selections:
        return "a data stage needs samples or other: name the samples/ of a run in samples, or demonstrations in other"
    reasons = ", ".join(f"{why} {n}" for why, n in left_out.most_common())
    return (
        f"none of {sum(s.num_samples for s in selections)} samples is left ({reasons}), and there are no other rows; loosen "
        "samples.filter, or sample more"
    )
