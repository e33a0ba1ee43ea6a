"""`grpo-ray decontaminate`: write the training rows that share no words with a test set."""

from __future__ import annotations

from pathlib import Path

from grpo_ray.config.data import DataSource
from grpo_ray.data.decontaminate import (
    SHORTEST,
    Contaminated,
    TestPrompts,
    find_contaminated,
    ngram_hashes,
    prompt_texts,
    write_jsonl,
)
from grpo_ray.data.sources import Table, load_table
from grpo_ray.errors import ConfigError, DataError
from grpo_ray.files import aside_of
from launch.console import plain_console
from launch.interrupts import leaving

EXAMPLES = 5
SEED = 1
"""The seed of generators that name none, as in a run."""
console = plain_console(soft_wrap=True)


def source_of(path: str, name: str | None, split: str | None, usual: str) -> DataSource:
    """The data source. A subset exists only for data sets on the hub, and so does the `usual` split; of a file all rows are
    compared."""
    source = DataSource(path=path)
    if source.is_file or source.is_generator:
        return DataSource(path=path, split=split or "train")
    return DataSource(path=path, name=name, split=split or usual)


def decontaminate(
    train: DataSource, tests: list[DataSource], column: str | None, test_column: str | None, n: int, out: Path | None
) -> Path:
    """Write the file with the kept rows, and return it; print counts and examples.

    Raises:
        ConfigError: `out` is one of the inputs.
        DataError: something can't be read or written, or no row would be left.
    """
    known = TestPrompts()
    for source in tests:
        table = load_table(source, seed=SEED)
        new = ngram_hashes(prompt_texts(table, test_column), n)
        console.print(f"against  {table.label}: {len(table.rows):,} prompts, {_parts(new, n)}")
        known.update(new)
    table = load_table(train, seed=SEED)
    target = out or _beside(train.path, table.name)
    if any(target.resolve() == Path(source.path).resolve() for source in [train, *tests]):
        raise ConfigError(f"--out {target} is one of the files to read; name another")
    found = find_contaminated(table, column, known, n)
    if len(found) == len(table.rows):
        raise DataError(
            f"every one of the {len(table.rows):,} rows of {table.label} shares {n} words with a test set, so nothing was "
            "written; are they the same data, or do all prompts begin with the same instruction? Then raise --ngram"
        )
    removed = {c.row for c in found}
    with leaving(f"{target} was not written", lambda: aside_of(target).unlink(missing_ok=True)):
        kept = write_jsonl(target, (table.rows[i] for i in range(len(table.rows)) if i not in removed))
    _print_examples(table, found)
    share = len(found) / len(table.rows)
    console.print(f"removed  {len(found):,} of {len(table.rows):,} rows of {table.label} ({share:.2%})")
    console.print(f"kept     {kept:,} rows in {target}")
    return target


def _parts(known: TestPrompts, n: int) -> str:
    parts = [f"{len(known.grams):,} different {n}-grams"]
    if known.short_hashes:
        parts.append(f"{len(known.short_hashes):,} prompts of fewer words, looked for whole in every row")
    if known.tiny_hashes:
        parts.append(
            f"{len(known.tiny_hashes):,} of fewer than {SHORTEST} words, found only where they are the whole row"
        )
    return ", ".join(parts)


def _beside(path: str, name: str) -> Path:
    """A path next to a file; in the current folder for what is not a file."""
    file = Path(path).expanduser()
    return (file.parent if file.is_file() else Path()) / f"{name}.decontaminated.jsonl"


def _print_examples(table: Table, found: list[Contaminated]) -> None:
    for one in found[:EXAMPLES]:
        console.print(f"removed  {table.where(one.row)}: {one.shared!r}")
    if len(found) > EXAMPLES:
        console.print(f"         and {len(found) - EXAMPLES:,} more")
