"""Files of `grpo-ray sample`: Parquet files of scored samples, each complete or absent, and the settings they were made with.

RUN/samples.json                   model (with its SHA-256), prompts, seed, sampling: the same for every file
RUN/samples/samples-000000.parquet prompts 0 .. shard_prompts - 1, all samples of each, in order; prompts without any, since they
crash
                                   engines, are named in its metadata (`left_out`)

Anything that reads Parquet can read them: `pandas.read_parquet(folder)`, `load_dataset("parquet", data_dir=folder)`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grpo_ray import json_text
from grpo_ray.errors import DataError
from grpo_ray.files import ASIDE, read_json, write_whole
from grpo_ray.run.sample_columns import sample_cells, schema, score_cells, table_of, utf8
from grpo_ray.seeds import sample_seed
from grpo_ray.types import Prompt, Sample, Score

SCHEMA = schema(
    (
        "prompt_id",
        "index",
        "prompt",
        "messages",
        "completion",
        "turns",
        "prompt_ids",
        "completion_ids",
        "versions",
        "num_sampled",
        "finish_reason",
        "reward",
        "reward_status",
        "rewards",
        "columns",
        "seed",
        "model_sha256",
    ),
    reward_fields=("name", "status", "value", "detail", "extra"),
)
"""Columns as in `sample_columns.COLUMNS`."""


MAX_SHARDS = 999_999
"""The most files, limited by the digits in their names."""


@dataclass(frozen=True)
class About:
    """The settings that all samples of a folder have in common."""

    model: str
    model_sha256: str
    """The SHA-256 of the model's files, see `manifest.digest_of`; empty for a name on the hub."""
    prompts: str
    """The fingerprint of the prompts."""
    num_prompts: int
    num_samples: int
    """The number of samples of each prompt."""
    shard_prompts: int
    seed: int
    """The seed of the run; a sample's own is in its row."""
    sampling: dict[str, Any]
    rewards: list[dict[str, Any]]
    """Name, weight and arguments of the reward functions."""

    @property
    def num_shards(self) -> int:
        return -(-self.num_prompts // self.shard_prompts)

    def shard(self, number: int) -> range:
        """The indices of the file's prompts."""
        return range(number * self.shard_prompts, min((number + 1) * self.shard_prompts, self.num_prompts))


@dataclass(frozen=True)
class SampledPrompt:
    """One prompt with all its samples."""

    prompt: Prompt
    messages: list[dict[str, Any]]
    """The messages of the row, before the template."""
    samples: Sequence[Sample]
    scores: Sequence[Score]


@dataclass(frozen=True)
class LeftOut:
    """A prompt without samples."""

    prompt_id: str
    why: str


class SampleFolder:
    """The files of one `About`."""

    def __init__(self, path: Path, about: About) -> None:
        self.path = path
        self.about = about

    @classmethod
    def open(cls, path: Path, about: About) -> SampleFolder:
        """Create a folder, or open one to continue. Leftovers of an interrupted write are removed.

        Raises:
            DataError: its files were made with something else.
        """
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob(f"*{ASIDE}"):
            left.unlink()
        file = about_file(path)
        wanted = json.loads(json.dumps(asdict(about)))
        if file.is_file():
            there = _read_about(file)
            different = [key for key, value in wanted.items() if there.get(key) != value]
            if different:
                key = different[0]
                raise DataError(
                    f"{path} holds samples made with another {key} ({there.get(key)!r:.80}, now {wanted[key]!r:.80}): samples of "
                    "two kinds are never mixed; choose another name with name=..., or remove the folder"
                )
        elif any(path.glob("samples-*.parquet")):
            raise DataError(
                f"{path} holds samples and {file}, which says how they were made, is gone: put it back, choose another name with "
                "name=..., or move the folder away"
            )
        else:
            write_whole(file, json.dumps(wanted, indent=1).encode())
        return cls(path, about)

    def missing(self) -> list[int]:
        """The numbers of the files that are still to be made."""
        return [n for n in range(self.about.num_shards) if not self._file(n).is_file()]

    def num_samples(self) -> int:
        """The number of samples in the existing files."""
        numbers = set(range(self.about.num_shards)).difference(self.missing())
        return sum(int(pq.read_metadata(self._file(n)).num_rows) for n in numbers)

    def write(self, number: int, drawn: Sequence[SampledPrompt], left_out: Sequence[LeftOut] = ()) -> Path:
        """Write a file, which is complete or absent."""
        rows = [self._row(one, i) for one in drawn for i in range(len(one.samples))]
        notes = {"left_out": _json([asdict(one) for one in left_out])} if left_out else None
        sink = pa.BufferOutputStream()
        pq.write_table(table_of(rows, SCHEMA.with_metadata(notes)), sink, compression="zstd")
        file = self._file(number)
        write_whole(file, memoryview(sink.getvalue()))
        return file

    def _file(self, number: int) -> Path:
        return self.path / f"samples-{number:06d}.parquet"

    def _row(self, drawn: SampledPrompt, i: int) -> dict[str, Any]:
        prompt, sample, score = drawn.prompt, drawn.samples[i], drawn.scores[i]
        return {
            **sample_cells(sample),
            **score_cells(score),
            "prompt": utf8(prompt.text),
            "messages": _json(drawn.messages),
            "columns": _json(prompt.columns),
            "seed": sample_seed(self.about.seed, prompt.id, sample.index),
            "model_sha256": self.about.model_sha256,
        }


def read_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a folder in order, with `messages`, `turns` and `columns` decoded.

    Raises:
        DataError: there are no files, or one is missing.
    """
    file = about_file(folder)
    if not file.is_file():
        raise DataError(
            f"{folder} is no folder of samples: there is no {file}; expected the samples/ of `grpo-ray sample`"
        )
    samples = SampleFolder(folder, _about(file))
    if lacking := samples.missing():
        raise DataError(
            f"{folder} is not complete: {len(lacking)} of {samples.about.num_shards} files are missing, the first is number "
            f"{lacking[0]}; go on with the run that makes them"
        )
    for number in range(samples.about.num_shards):
        yield from _rows_of(samples._file(number))


def _rows_of(file: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches():
                rows = batch.to_pylist()
                for row in rows:
                    named = ("messages", "columns", *(("turns",) if row.get("turns") is not None else ()))
                    row |= {name: json_text.read(row[name]) for name in named}
                yield from rows
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as e:
        raise DataError(f"{file} is not what `grpo-ray sample` writes ({type(e).__name__}: {e!s:.200})") from None


def _read_about(file: Path) -> dict[str, Any]:
    """Read the settings. Raises DataError for a file that is no JSON object."""
    try:
        found = read_json(file)
    except (OSError, ValueError) as e:
        raise DataError(f"{file} can't be read ({e!s:.200}); put it back from a copy") from None
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected a mapping, got {type(found).__name__}")
    return found


def _about(file: Path) -> About:
    """Parse the settings. Raises DataError for a file that was not written by `open`."""
    try:
        about = About(**_read_about(file))
        if 0 < about.num_shards <= MAX_SHARDS:
            return about
        why = f"it tells of {about.num_shards} files"
    except (TypeError, ArithmeticError) as e:
        why = str(e)
    raise DataError(f"{file} is not what `grpo-ray sample` writes ({why:.200}); put it back from a copy")


def about_file(folder: Path) -> Path:
    """The path of the settings, beside the folder, in which other programs expect only Parquet."""
    return folder.with_name(f"{folder.name}.json")


def _json(value: Any) -> str:
    return utf8(json.dumps(value, ensure_ascii=False, default=str))
