"""Large data sets for `grpo-ray check`: counts over all rows by Arrow, and a sample of rows to template and tokenize.

Exact are the numbers of rows, of columns that are missing or null, and of prompts that are repeated or held out too. Lengths, and
the rows left out for them, are estimated from the sample. A JSONL file that Arrow does not read (a column of several types, half a
character, a torn line) is read row by row, as for a run, and every one of its rows is examined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grpo_ray import json_text
from grpo_ray.config.data import DataSource
from grpo_ray.data.sources import Row, Table, is_part, load_table, map_columns
from grpo_ray.data.tokenized import check_characters
from grpo_ray.errors import DataError
from grpo_ray.rewards.columns import ColumnFacts, RowFacts

MANY_ROWS = 20_000
"""The number of rows from which a data set is sampled; with fewer, each row is read."""
SAMPLE = 1000
LONGEST = 16
PARTS = 8
"""The number of parts; a power of two."""
_KEYS = ("prompt", "messages", "completion", "chosen", "rejected", "label")
"""The columns that a row cannot lack; the first row without one is in the sample, where it is reported."""


def _numbers(values: Sequence[int], kind: type[np.integer[Any]] = np.int64) -> pa.Array:
    """An Arrow array, without a conversion: pyarrow imports pandas for its first one, which takes half a second and 45 MB."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(values), [None, pa.py_buffer(np.asarray(values, kind))])


def _texts(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow array of text, likewise without a conversion."""
    encoded = [text.encode() for text in values]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string(), len(encoded), buffers).cast(kind)


_TRUE = pa.Array.from_buffers(pa.bool_(), 1, [None, pa.py_buffer(b"\1")])[0]


class ArrowFacts:
    """The `ColumnFacts` of an Arrow table."""

    def __init__(self, table: pa.Table, columns: Mapping[str, str]) -> None:
        taken = set(columns.values())
        kept = {name: table.column(name) for name in table.column_names if name not in taken}
        # A prompt is not a column of rewards; nor are messages where they are the prompt.
        self._hidden = {"prompt"} if "prompt" in kept or "prompt" in columns else {"messages"}
        self._columns = kept | {
            new: found for new, old in columns.items() if (found := _nested(table, old)) is not None
        }
        self._num_rows = table.num_rows

    @property
    def names(self) -> list[str]:
        return [name for name in self._columns if name not in self._hidden]

    def column(self, name: str) -> pa.ChunkedArray | None:
        return self._columns.get(name)

    def lacking(self, names: Sequence[str], of: str | None, values: Sequence[str]) -> tuple[int, int, bool]:
        found = [column for name in names if (column := self._value(name)) is not None]
        nulls = [pc.is_null(column) for column in found]
        if of is None:
            return self._num_rows, _count(reduce(pc.and_, nulls)) if nulls else self._num_rows, bool(found)
        rows = self._rows_of(of, values)
        if rows is None:
            return 0, 0, False
        num_rows = _count(rows)
        return num_rows, _count(reduce(pc.and_, nulls, rows)), bool(found) and num_rows > 0

    def _rows_of(self, of: str, values: Sequence[str]) -> Any:
        """The rows whose column is one of these; None: it holds no text."""
        column = self._columns[of]
        return pc.is_in(column, _texts(values, column.type)) if _is_text(column) else None

    def _value(self, name: str) -> pa.ChunkedArray | None:
        if name in self._columns:
            return self._columns[name]
        head, _, entry = name.partition(".")
        column = self._columns.get(head)
        return None if column is None or not entry else _entry(column, entry)


def _nested(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    if name in table.column_names:
        return table.column(name)
    head, *rest = name.split(".")
    column = table.column(head) if head in table.column_names else None
    for entry in rest:
        column = None if column is None else _entry(column, entry)
    return column


def _entry(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray | None:
    kind = column.type
    if not pa.types.is_struct(kind) or kind.get_field_index(name) < 0:
        return None
    return pc.struct_field(column, name)


def _count(mask: Any) -> int:
    return int(pc.sum(mask).as_py() or 0)


@dataclass
class Overview:
    """The overview of one data set of many rows."""

    num_rows: int
    num_looked_at: int
    """The number of rows in the sample."""
    facts: ColumnFacts
    longest: Table
    """The rows with the longest prompts."""
    prompts: pa.ChunkedArray | None
    """[num_rows] the prompts, where they are text."""

    @cached_property
    def num_repeated(self) -> int:
        """The number of rows whose prompt an earlier row has."""
        if self.prompts is None:
            return 0
        return self.num_rows - _num_different(self.prompts)

    def num_in(self, prompts: Iterable[Any]) -> int | None:
        """The number of rows whose prompt is one of these; None: unknown, for prompts that are not text."""
        texts = list(prompts)
        if self.prompts is None or not all(isinstance(p, str) for p in texts):
            return None
        return _count(pc.is_in(self.prompts, _texts(texts, self.prompts.type)))

    def scaled(self, number: int) -> int:
        """The estimate for all rows of a number counted in the sample."""
        return round(number * self.num_rows / max(1, self.num_looked_at))


@dataclass
class Sampler:
    """Reads data sets as `load_table` does; large ones are sampled, and an overview of each is kept."""

    many_rows: int = MANY_ROWS
    overviews: dict[str, Overview] = field(default_factory=dict)
    """Key of a source -> its overview."""

    def read(self, source: DataSource, *, seed: int) -> Table:
        """The rows, or a sample of them; raises DataError as `load_table` does."""
        found = _arrow(source)
        if found is not None and found[0].num_rows <= self.many_rows:
            return load_table(source, seed=seed)
        if found is None:
            return self._sample_of_rows(load_table(source, seed=seed), source)
        arrow, pick = found
        facts = ArrowFacts(arrow, source.columns)
        prompts = facts.column("prompt")
        chosen = dict.fromkeys([*_evenly(arrow.num_rows), *_first_nulls(facts)])
        name = Path(source.path).stem
        text = _is_text(prompts)
        longest = _longest(prompts) if text else []
        self.overviews[key_of(source)] = Overview(
            arrow.num_rows, len(chosen), facts, pick(name, longest), prompts if text else None
        )
        sample: Table = pick(name, sorted(chosen))
        return sample

    def _sample_of_rows(self, table: Table, source: DataSource) -> Table:
        num_rows = len(table.rows)
        if num_rows <= self.many_rows:
            return table
        rows = [map_columns(table.rows[i], source.columns, table.where(i)) for i in range(num_rows)]
        for i, row in enumerate(rows):
            for name in _KEYS:
                if isinstance(text := row.get(name), str):
                    _check_text(text, table.where(i), name)
        texts = [row.get("prompt") for row in rows]
        strings = all(isinstance(text, str) for text in texts)
        prompts = pa.chunked_array([_texts(texts, pa.large_string())]) if strings else None
        bad = next((i for i, row in enumerate(rows) if not _asks(row)), None)
        chosen = dict.fromkeys([*_evenly(num_rows), *([] if bad is None else [bad])])
        self.overviews[key_of(source)] = Overview(
            num_rows, len(chosen), RowFacts(rows), _picked(table, _longest(prompts) if strings else []), prompts
        )
        return _picked(table, sorted(chosen))


def key_of(source: DataSource) -> str:
    return source.model_dump_json()


def _asks(row: Row) -> bool:
    """Whether the row has text or messages for a prompt, judged by types."""
    prompt = row["messages"] if row.get("prompt") is None and "messages" in row else row.get("prompt")
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in prompt)
    return isinstance(prompt, str) and bool(prompt)


def _check_text(text: str, where: str, name: str) -> None:
    try:
        check_characters(text, f"column {name!r}")
    except DataError as e:
        raise DataError(f"{where}: {e}") from None


def _picked(table: Table, places: Sequence[int]) -> Table:
    lines = None if table.lines is None else [table.lines[i] for i in places]
    return replace(table, rows=[table.rows[i] for i in places], lines=lines, numbers=list(places))


def _arrow(source: DataSource) -> tuple[pa.Table, Any] | None:
    """(the table, (name, indices) -> these rows as a run reads them); None: not a file that Arrow reads as a run would."""
    if is_part(source) or not source.is_file or not Path(source.path).expanduser().is_file():
        return None
    try:
        table, pick = (_of_parquet if source.path.endswith(".parquet") else _of_jsonl)(source)
    except (pa.ArrowException, OSError, ValueError):
        return None
    return table, pick


def _of_parquet(source: DataSource) -> tuple[pa.Table, Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(Path(source.path).expanduser()).slice(0, source.limit)

    def pick(name: str, places: Sequence[int]) -> Table:
        rows: list[Row] = table.take(_numbers(places)).to_pylist()
        return Table(name, source.path, rows, numbers=list(places))

    return table, pick


def _of_jsonl(source: DataSource) -> tuple[pa.Table, Any]:
    """As `_arrow`, for a JSONL file; raises ValueError where lines and rows do not correspond."""
    import pyarrow.json as pj

    path = Path(source.path).expanduser()
    data = path.read_bytes()
    # The system's pool returns what was needed for a moment; Arrow's own keeps it.
    table = pj.read_json(pa.BufferReader(data), memory_pool=pa.system_memory_pool())
    table.validate(full=True)
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    starts = np.concatenate([[0], ends + 1])
    ends = np.concatenate([ends, [len(data)]])
    lines = np.flatnonzero(ends - starts > 1)
    if len(lines) != table.num_rows:
        raise ValueError("blank lines that are not empty, or several rows in a line")
    table = table.slice(0, source.limit)

    def pick(name: str, places: Sequence[int]) -> Table:
        chosen = [int(lines[i]) for i in places]
        with path.open("rb") as file:
            rows = [json_text.read_strictly(_bytes_of(file, starts[line], ends[line])) for line in chosen]
        return Table(name, source.path, rows, [line + 1 for line in chosen], list(places))

    return table, pick


def _bytes_of(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _evenly(num_rows: int) -> list[int]:
    return [i * num_rows // SAMPLE for i in range(SAMPLE)]


def _first_nulls(facts: ArrowFacts) -> list[int]:
    """For each key column, the first row without a value, and the first that is empty."""
    out = []
    for name in _KEYS:
        column = facts.column(name)
        if column is None:
            continue
        masks = [pc.is_null(column)] if column.null_count else []
        if _is_text(column):
            masks.append(pc.equal(pc.binary_length(column), _numbers([0])[0]))
        elif pa.types.is_list(column.type):
            masks.append(pc.equal(pc.list_value_length(column), _numbers([0])[0]))
        places = (pc.index(mask, _TRUE).as_py() for mask in masks)
        out += [place for place in places if place >= 0]
        out += _first_without_content(column)
    return out


def _first_without_content(column: pa.ChunkedArray) -> list[int]:
    """The first conversation with a message that has no content, if there is one."""
    if not (pa.types.is_list(column.type) and pa.types.is_struct(column.type.value_type)):
        return []
    conversations = column.combine_chunks()
    messages = pc.list_flatten(conversations)
    if messages.type.get_field_index("content") < 0:
        return []
    place = pc.index(pc.is_null(pc.struct_field(messages, "content")), _TRUE).as_py()
    return [] if place < 0 else [pc.list_parent_indices(conversations)[place].as_py()]


def _num_different(texts: pa.ChunkedArray) -> int:
    """The number of different texts, counted part by part by their length, so that the table of those seen stays small. Null is
    one more."""
    pool = pa.system_memory_pool()
    part = pc.bit_wise_and(pc.binary_length(texts), _numbers([PARTS - 1], np.int32)[0])
    parts = (pc.filter(texts, pc.equal(part, i), memory_pool=pool) for i in _numbers(range(PARTS), np.int32))
    return sum(int(pc.count_distinct(each, memory_pool=pool).as_py()) for each in parts) + int(texts.null_count > 0)


def _is_text(column: pa.ChunkedArray | None) -> bool:
    return column is not None and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type))


def _longest(prompts: pa.ChunkedArray) -> list[int]:
    lengths = pc.coalesce(pc.binary_length(prompts), _numbers([0], np.int32)[0])
    order = pc.select_k_unstable(pa.table({"n": lengths}), LONGEST, [("n", "descending")])
    return [int(i) for i in order.to_pylist()]
