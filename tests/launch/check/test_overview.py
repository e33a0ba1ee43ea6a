"""Large data sets are looked at by Arrow and by a sample: what is counted is what counting row by row gives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_ray.config.data import DataConfig, DataSource
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.data.prompts import load_prompts
from grpo_ray.data.sources import load_table, map_columns
from grpo_ray.errors import DataError
from grpo_ray.models.files.loading import load_tokenizer
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.rewards.columns import RowFacts
from launch.check.overview import ArrowFacts, Sampler, key_of
from tests.cpu_time import cpu_below

COLUMNS = {"prompt": "question", "level": "meta.level"}


def make_rows(number: int) -> list[dict[str, Any]]:
    draw = random.Random(1)
    rows: list[dict[str, Any]] = []
    for i in range(number):
        row: dict[str, Any] = {"question": f"What is {i % (number - 5)}?", "source": draw.choice(["a", "b"])}
        row["answer"] = str(i) if draw.random() < 0.9 else None
        row["meta"] = {"level": draw.choice([1, 2, None]), "at": "2020-01-01"}
        row["reward_model"] = {"ground_truth": draw.choice(["1", None]), "style": "rule"}
        rows.append(row)
    return rows


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> DataSource:
    file = folder / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return DataSource(path=str(file), columns=COLUMNS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_model(folder, TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1))
    return load_tokenizer(str(folder), trust_remote_code=False)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_counted_by_arrow_is_what_rows_give(kind: str, tmp_path: Path) -> None:
    rows = make_rows(2000)
    source = write(tmp_path, rows, kind)
    sampler = Sampler(many_rows=100)
    table = sampler.read(source, seed=1)
    overview = sampler.overviews[key_of(source)]
    assert isinstance(overview.facts, ArrowFacts)
    whole = load_table(source, seed=1)
    mapped = [map_columns(whole.rows[i], COLUMNS, "") for i in range(2000)]
    by_rows = RowFacts([{k: v for k, v in row.items() if k != "prompt"} for row in mapped])
    assert set(overview.facts.names) == set(by_rows.names)
    for names in (("answer",), ("level",), ("reward_model.ground_truth", "answer"), ("none",), ("meta.none",), ()):
        for of, values in ((None, ()), ("source", ("a",)), ("source", ("x",))):
            assert overview.facts.lacking(names, of, values) == by_rows.lacking(names, of, values), (names, of)
    assert (overview.num_rows, overview.num_looked_at, overview.num_repeated) == (2000, 1000, 5)
    assert overview.num_in(["What is 7?", "What is 1?", "no"]) == 3
    assert table.numbers is not None
    assert [table.rows[i] for i in range(1000)] == [whole.rows[n] for n in table.numbers]
    assert [table.where(i) for i in (0, 999)] == [whole.where(n) for n in (table.numbers[0], table.numbers[999])]


def test_a_small_data_set_is_read_whole(tmp_path: Path) -> None:
    source = write(tmp_path, make_rows(50), "jsonl")
    sampler = Sampler(many_rows=50)
    assert len(sampler.read(source, seed=1).rows) == 50
    assert not sampler.overviews


BAD: list[tuple[str, str]] = [
    ('{"question": null, "meta": {"level": 1}}', "column 'prompt' is null"),
    ('{"question": "a \\ud83d", "meta": {"level": 1}}', "holds half of a character"),
    ('{"question": "a", "meta": {"level": 1}', "not valid JSON"),
    ('{"question": 7, "meta": {"level": 1}}', "expected text or a list of messages"),
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_message_without_content_is_told_by_its_row(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**row, "question": [{"role": "user", "content": row["question"]}]} for row in make_rows(3000)]
    rows[1234]["question"][0]["content"] = None
    source = write(tmp_path, rows, kind)
    with pytest.raises(DataError, match=r"(line 1235|row 1234), column 'prompt', message 0: expected"):
        load_prompts(DataConfig(train=source), tokenizer, seed=1, read=Sampler(many_rows=100).read)


@pytest.mark.parametrize(("line", "expected"), BAD)
def test_a_row_that_no_sample_would_have_met_is_told_by_its_line(
    line: str, expected: str, tmp_path: Path, tokenizer: Any
) -> None:
    source = write(tmp_path, make_rows(3000), "jsonl")
    file = Path(source.path)
    lines = file.read_text().split("\n")
    lines[1234] = line
    file.write_text("\n\n" + "\n".join(lines))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1237\D.*{expected}"):
        load_prompts(DataConfig(train=source), tokenizer, seed=1, read=Sampler(many_rows=100).read)


def test_a_column_of_several_types_is_counted_row_by_row(tmp_path: Path, tokenizer: Any) -> None:
    rows = make_rows(2000)
    for i in range(0, 2000, 2):
        rows[i]["answer"] = i
    source = write(tmp_path, rows, "jsonl")
    sampler = Sampler(many_rows=100)
    prompts = load_prompts(DataConfig(train=source), tokenizer, seed=1, read=sampler.read)
    overview = sampler.overviews[key_of(source)]
    assert isinstance(overview.facts, RowFacts)
    assert overview.facts.lacking(("answer",), None, ())[1] == sum(row["answer"] is None for row in rows)
    assert (len(prompts.train), overview.num_repeated) == (1000, 5)


def test_the_longest_prompts_are_looked_at_whatever_the_sample_is(tmp_path: Path) -> None:
    rows = make_rows(2000)
    rows[1777]["question"] = "long " * 40
    source = write(tmp_path, rows, "parquet")
    sampler = Sampler(many_rows=100)
    sampler.read(source, seed=1)
    longest = sampler.overviews[key_of(source)].longest
    assert longest.rows[0]["question"] == "long " * 40
    assert longest.where(0).endswith("rows.parquet, row 1777")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_two_hundred_thousand_rows_take_two_seconds_and_little_memory(kind: str, tmp_path: Path) -> None:
    row = {"question": "What is the sum of all numbers up to N? " * 2, "answer": "7", "meta": {"level": 1}}
    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_bytes((json.dumps(row) + "\n").encode() * 200_000)
    else:
        pq.write_table(pa.Table.from_pylist([row] * 1000 * 1), file)
        pq.write_table(pa.concat_tables([pq.read_table(file)] * 200), file)
    source = DataSource(path=str(file), columns=COLUMNS)
    sampler = Sampler()
    held = pa.total_allocated_bytes()
    with cpu_below(10):
        sampler.read(source, seed=1)
    overview = sampler.overviews[key_of(source)]
    assert (overview.num_rows, overview.num_repeated) == (200_000, 199_999)
    assert pa.total_allocated_bytes() - held < 150e6
