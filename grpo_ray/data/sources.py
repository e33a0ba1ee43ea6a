"""Rows from files, hubs and generators: `DataSource` -> `Table`. `grpo_ray.data.prompts` interprets the rows."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from grpo_ray import json_text
from grpo_ray.config.data import DataSource
from grpo_ray.errors import DataError, kind_and_line
from grpo_ray.suggest import closest, did_you_mean
from grpo_ray.user_code.functions import UserFunction, of_module
from grpo_ray.user_code.places import ForeignCodeError

Row = dict[str, Any]
_MANY_ROWS = 1000
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class Table:
    """The rows of one source, columns not yet mapped."""

    name: str
    """A short and stable name, the first part of every prompt id."""
    label: str
    """The source's name in errors: its path."""
    rows: Sequence[Row]
    lines: Sequence[int] | None = None
    """The line number of each row, for JSONL."""
    numbers: Sequence[int] | None = None
    """The number of each row in the source; None: all rows are there, in order."""

    def where(self, row: int) -> str:
        """The location of a row in messages: `file.jsonl, line 17` or `gym:task, row 16`."""
        if self.lines is not None:
            return f"{self.label}, line {self.lines[row]}"
        return f"{self.label}, row {self.number(row)}"

    def number(self, row: int) -> int:
        """The number of a row in the source."""
        return row if self.numbers is None else self.numbers[row]


Read = Callable[..., Table]
"""The type of `load_table`: (source, *, seed) -> its rows."""


def load_table(source: DataSource, *, seed: int) -> Table:
    """Read a source.

    Args:
        seed: the seed of generators without one in their `args`.

    Raises:
        DataError: the source can't be read, or has no rows; says where, and the fix.
    """
    _check_options(source)
    scheme, colon, rest = source.path.partition(":")
    if colon and scheme == "reasoning_gym":
        table = _reasoning_gym(source, rest, seed)
    elif (function := python_function(source)) is not None:
        table = _python(source, function)
    elif source.path.endswith((".jsonl", ".ndjson")):
        table = _jsonl(source)
    elif source.path.endswith(".parquet"):
        table = _parquet(source)
    elif Path(source.path).is_file():
        raise DataError(f"{source.path}: can't read this kind of file; expected .jsonl or .parquet")
    else:
        table = _hugging_face(source)
    if (source.is_generator or source.is_file) and is_part(source):
        table = _part(table, source)
    if len(table.rows) == 0:
        raise DataError(f"{source.path}: the data set is empty; expected at least one row")
    return table


def _check_options(source: DataSource) -> None:
    """Raises DataError for an option that belongs to another kind of source."""
    if source.name is not None and (source.is_file or source.is_generator):
        raise DataError(
            f"{source.path}: name {source.name!r} is a subset of a Hugging Face data set, and this has none; take it out"
        )
    if source.package is not None and not source.path.startswith("python:"):
        raise DataError(f"{source.path}: package {source.package!r} is of python:module.function alone; take it out")
    if source.args and not source.is_generator:
        raise DataError(
            f"{source.path}: args {source.args} are a generator's (reasoning_gym:TASK, python:module.function); take them out "
            "(over a recipe that has some: data.train.args={})"
        )


def is_part(source: DataSource) -> bool:
    return source.split != "train"


def _first_rows(source: DataSource) -> int | None:
    """The number of rows that have to be read; None: all."""
    return None if is_part(source) else source.limit


def _part(table: Table, source: DataSource) -> Table:
    """The rows of a file or a generator, whose one split is `train`, that `split` and `limit` keep."""
    rows = [row for _, row in _chosen(source, {"train": len(table.rows)})][: source.limit]
    lines = None if table.lines is None else [table.lines[row] for row in rows]
    return Table(table.name, table.label, [table.rows[row] for row in rows], lines)


def _chosen(source: DataSource, splits: Mapping[str, int]) -> list[tuple[str, int]]:
    """(split, row) of each row that `split` selects, in the syntax of `datasets`.

    Args:
        splits: the number of rows of each split.

    Raises:
        DataError: no row is selected, or there is no such split.
    """
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute(dict(splits))
    except (ValueError, AssertionError):
        first = next(iter(splits))
        raise DataError(
            f"{source.path} has no split {source.split!r}; it has: {', '.join(splits)}, and a part of one is {first}[:50%] or "
            f"{first}[100:200]" + ("; for another split name another file" if source.is_file else "")
        ) from None
    rows = [(part.splitname, row) for part in parts for row in range(part.from_, part.to)]
    if not rows:
        raise DataError(f"{source.path}: split {source.split!r} holds none of its rows; it has: {_sizes(splits)}")
    return rows


def _sizes(splits: Mapping[str, int]) -> str:
    return ", ".join(f"{name} with {size}" for name, size in splits.items())


def _existing(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(f.name for f in file.iterdir() if f.suffix in (".jsonl", ".ndjson", ".parquet"))
        hint = f": name the file in it, e.g. {file / inside[0]}" if inside else " without data files in it"
        raise DataError(f"{path} is a folder{hint}")
    if not file.is_file():
        files = [f.name for f in file.parent.iterdir() if not f.is_dir()] if file.parent.is_dir() else []
        close = closest(file.name, files)
        hint = f"; did you mean {file.parent / close}?" if close else f" (looked from {Path.cwd()})"
        raise DataError(f"{path}: no such file{hint}")
    if not os.access(file, os.R_OK):
        raise DataError(f"{path} can't be read by this user")
    return file


def _jsonl(source: DataSource) -> Table:
    file = _existing(source.path)
    rows: list[Row] = []
    lines: list[int] = []
    with file.open("rb") as f:
        for number, raw in enumerate(iter(lambda: f.readline(MAX_LINE_BYTES + 1), b""), start=1):
            if not raw.strip():
                continue
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"{source.path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; is it a row?")
            try:
                row = json_text.read_strictly(raw)
            except ValueError as e:
                raise DataError(f"{source.path}, line {number}: {e}") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{source.path}, line {number}: expected a JSON object such as "
                    f'{{"prompt": "..."}}, got {type(row).__name__}'
                )
            rows.append(row)
            lines.append(number)
            if len(rows) == _first_rows(source):
                break
    return Table(file.stem, source.path, rows, lines)


def _parquet(source: DataSource) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = _existing(source.path)
    rows: list[Row] = []
    limit = _first_rows(source)
    try:
        with pq.ParquetFile(file) as f:
            names = f.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{source.path}: there are two columns {twice!r}; rename one")
            for batch in f.iter_batches():
                rows += _rows_of(batch, source.path, len(rows))
                if limit is not None and len(rows) >= limit:
                    break
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{source.path}: not a readable Parquet file: {kind_and_line(e)}") from None
    return Table(file.stem, source.path, rows[:limit])


def _rows_of(batch: Any, path: str, before: int) -> list[Row]:
    """The rows of a batch. Raises DataError for a row that Python can't hold: text that is no UTF-8, a time of another age."""
    try:
        rows: list[Row] = batch.to_pylist()
        return rows
    except (ValueError, ArithmeticError) as e:
        if batch.num_rows == 1:
            raise DataError(f"{path}, row {before}: {kind_and_line(e)}") from None
    half = batch.num_rows // 2
    return [*_rows_of(batch.slice(0, half), path, before), *_rows_of(batch.slice(half), path, before + half)]


def _hugging_face(source: DataSource) -> Table:
    import datasets

    folder = Path(source.path).expanduser()
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved and source.name is not None:
        raise DataError(f"data set {source.path!r} was saved to disk, without subsets: take name {source.name!r} out")
    options = f"name {source.name!r}, split {source.split!r}"
    try:
        found = (
            datasets.load_from_disk(str(folder))
            if saved
            else datasets.load_dataset(str(folder) if folder.is_dir() else source.path, source.name, split=source.split)
        )
    # The library raises a dozen kinds of its own, of HTTP clients and of Python; each of them means that the data are
    # unavailable.
    except Exception as e:
        raise DataError(
            f"data set {source.path!r} ({options}) can't be loaded: {kind_and_line(e)}; expected a .jsonl or .parquet "
            "file, a local folder, or a name on the Hugging Face hub (from there: a network, or an earlier download and "
            "HF_HUB_OFFLINE=1)"
        ) from e
    if saved:
        found = _saved_part(source, found)
    if source.limit is not None:
        found = found.select(range(min(source.limit, len(found))))
    parts = (folder.name, source.name, source.split)
    return Table("-".join(p for p in parts if p), source.path, found)


def _saved_part(source: DataSource, found: Any) -> Any:
    """The rows that `split` selects of a data set, or of a mapping of splits, that was saved to disk."""
    from datasets import Dataset, concatenate_datasets

    splits = {str(found.split or "train"): found} if isinstance(found, Dataset) else dict(found)
    if isinstance(found, Dataset) and not is_part(source):
        return found
    chosen = _chosen(source, {name: len(rows) for name, rows in splits.items()})
    runs = [(name, [row for _, row in run]) for name, run in groupby(chosen, key=lambda one: one[0])]
    return concatenate_datasets([splits[name].select(rows) for name, rows in runs])


def _reasoning_gym(source: DataSource, task: str, seed: int) -> Table:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        some = f"there are {len(DATASETS)}, among them chain_sum, countdown"
        hint = did_you_mean(task, DATASETS, some, cutoff=0.5, count=3)
        raise DataError(f"{source.path}: reasoning-gym has no task {task!r}; {hint}")
    args = {"seed": seed, **source.args}
    try:
        dataset = reasoning_gym.create_dataset(task, **args)
    except (TypeError, AssertionError, ValueError) as e:
        fields = ", ".join(DATASETS[task][1].__dataclass_fields__)
        raise DataError(f"{source.path}: args {args} are refused: {kind_and_line(e)}; it takes: {fields}") from None
    rows = []
    limit = _first_rows(source)
    size = len(dataset) if limit is None else min(limit, len(dataset))
    with progress(f"generating {source.path}", size) as advance:
        for entry in islice(dataset, size):
            columns = {"prompt": entry["question"], **entry}
            rows.append({**columns, "reasoning_gym_entry": entry, "reasoning_gym_task": task})
            advance(1)
    return Table(task, source.path, rows)


def python_function(source: DataSource) -> UserFunction | None:
    """The function that creates the rows of a source, not imported; None if the source is no function.

    Raises:
        DataError: the function does not exist, or a recipe may not name it.
    """
    scheme, colon, dotted = source.path.partition(":")
    if not colon or scheme != "python":
        return None
    if "." not in dotted:
        raise DataError(f"{source.path}: expected python:module.function")
    try:
        return of_module(dotted, source.package)
    except ForeignCodeError as e:
        raise DataError(f"{source.path}: {e}") from None


def _python(source: DataSource, found: UserFunction) -> Table:
    try:
        function = found.load()
    except ForeignCodeError as e:
        raise DataError(f"{source.path}: {e}") from e
    try:
        rows = list(islice(_checked(function(**source.args), source.path), _first_rows(source)))
    except TypeError as e:
        raise DataError(f"{source.path}: calling it with args {source.args} failed: {e}") from e
    return Table(found.name, source.path, rows)


def _checked(rows: Iterable[Any], label: str) -> Iterator[Row]:
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{label}, row {i}: expected a dict such as {{'prompt': ...}}, got {type(row).__name__}")
        yield row


def map_columns(row: Row, columns: dict[str, str], where: str) -> Row:
    """The row with columns renamed by `columns` (name here -> name in the data). A dotted name is looked up inside, and its parent
    stays.

    Raises:
        DataError: a column is missing; lists those that exist.
    """
    values = {new: _lookup(row, old, new, where) for new, old in columns.items()}
    kept = {k: v for k, v in row.items() if k not in columns.values()}
    return {**kept, **values}


def _lookup(row: Row, name: str, new: str, where: str) -> Any:
    if name in row:
        return row[name]
    node: Any = row
    for part in name.split("."):
        if not isinstance(node, dict) or part not in node:
            has = (
                f"columns there: {', '.join(map(str, node))}"
                if isinstance(node, dict)
                else f"got {type(node).__name__}"
            )
            raise DataError(f"{where}: no column {name!r}, which data columns map to {new!r}; {has}")
        node = node[part]
    return node


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr for `total` rows, if they are many and stderr is a terminal; yields `advance(rows)`."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from grpo_ray.plain_terminal import one_line
    from grpo_ray.terminal import PlainConsole

    shown = total >= _MANY_ROWS and sys.stderr.isatty()
    told = TextColumn("{task.description}", markup=False)
    columns = (told, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=PlainConsole(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(one_line(what), total=total)
        yield lambda rows: bar.advance(task, rows)
