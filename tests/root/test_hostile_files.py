"""Files that a stranger wrote: data, recipes, overrides, and what a run has left. Each is an error that says where, at once."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_ray import json_text
from grpo_ray.config.data import DataSource
from grpo_ray.config.loading import build, load_yaml, parse_overrides
from grpo_ray.config.reward import RewardConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.yaml import MAX_BYTES, MAX_NODES
from grpo_ray.data.sources import MAX_LINE_BYTES, load_table
from grpo_ray.errors import CheckpointError, ConfigError, DataError, GrpoRayError, RewardError
from grpo_ray.pipeline.record import Record
from grpo_ray.report.page import write_report
from grpo_ray.rewards.columns import check_sets, column_needs
from grpo_ray.run.ended import read_ended
from grpo_ray.run.kept_groups import read_groups
from grpo_ray.run.ledger import Ledger, last_trained
from grpo_ray.run.replay import read_batch
from grpo_ray.run.sample_files import read_samples
from grpo_ray.telemetry.messages import read_messages
from grpo_ray.telemetry.trace_file import read_trace
from grpo_ray.telemetry.tracking import read_metrics
from launch.run.recipe import kind_of, load_recipe
from tests.cpu_time import cpu_below

DEEP = 200_000
CPU_S = 10.0


def at_once(call: Callable[[], Any]) -> Any:
    """What a call gives, if it takes no more than some CPU time: a second on a quiet machine."""
    with cpu_below(CPU_S):
        return call()


def refused(call: Callable[[], Any], kind: type[Exception]) -> str:
    with cpu_below(CPU_S), pytest.raises(kind) as caught:
        call()
    return str(caught.value)


# ---- data

VALUES = {
    "nested lists": ("[" * DEEP + "]" * DEEP, "nested too deeply"),
    "nested objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "nested too deeply"),
    "lists that are never closed": ("[" * DEEP, "nested too deeply"),
    "deeper than Parquet": ("[" * 101 + "]" * 101, "more than 100 lists and objects"),
    "a number of 5,000 digits": ("9" * 5000, "a number has thousands of digits"),
    "a number beyond a float": ("1e999", "the number 1e999 is beyond what a float can hold"),
    "a long number beyond a float": ("1" * 400 + ".5", "is beyond what a float can hold"),
    "NaN": ("NaN", "NaN is no number; write null"),
    "Infinity": ("[-Infinity]", "-Infinity is no number"),
    "half of a character, in a key": ('{"\\uDC00": 1}', "half of a character"),
    "half of a character, in a key deep inside": ('[{"a": [{"\\ud800": 1}]}]', "half of a character"),
    "a key that is given twice": ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
    "a NUL": ('"a\0b"', "not valid JSON: Invalid control character"),
    "two values": ("1 2", "not valid JSON"),
}


@pytest.mark.parametrize(("value", "words"), VALUES.values(), ids=VALUES)
def test_a_hostile_row_is_refused_with_file_and_line(tmp_path: Path, value: str, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n\n{{"prompt": "b", "answer": {value}}}\n')
    told = refused(lambda: load_table(DataSource(path=str(file)), seed=1), DataError)
    assert told.startswith(f"{file}, line 3: ")
    assert words in told
    assert len(told) < len(str(file)) + 250


def test_a_line_without_end_is_not_read_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as f:
        f.truncate(40 * MAX_LINE_BYTES)
    tracemalloc.start()
    try:
        told = refused(lambda: load_table(DataSource(path=str(file)), seed=1), DataError)
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_LINE_BYTES
    finally:
        tracemalloc.stop()
    assert told == f"{file}, line 1: longer than {MAX_LINE_BYTES:,} bytes; is it a row?"


@pytest.mark.parametrize("number", ["1e99999999", "1/0", "9" * 5000, "x", [1], float("nan"), float("inf"), None])
@pytest.mark.parametrize("column", ["target", "nums"])
def test_a_number_of_countdown_that_is_none_is_told_with_its_row(number: Any, column: str) -> None:
    row = {"prompt": "a", "target": 24, "nums": [1, 2]}
    bad = {**row, column: [1, number] if column == "nums" else number}
    names = {"name": "rows", "column_names": tuple(row), "rows_of_columns": [row, row, bad]}
    prompts: Any = SimpleNamespace(**names, item=lambda i, epoch: SimpleNamespace(id=f"rows/{epoch}/{i}"))
    needs = column_needs(RewardConfig.model_validate({"functions": [{"name": "countdown"}]}))
    if column == "target" and number is None:
        check_sets(needs, {"data.train": prompts})
    else:
        told = refused(lambda: check_sets(needs, {"data.train": prompts}), RewardError)
        assert told.startswith("data.train, row 2 of rows: reward 'countdown': ")


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    for raw in (b'"\xed\xa0\x80"', b'"\xff"', b'"\xf4\x90\x80\x80"'):
        file.write_bytes(b'{"prompt": "a"}\n{"prompt": ' + raw + b"}\n")
        told = refused(lambda: load_table(DataSource(path=str(file)), seed=1), DataError)
        assert told.startswith(f"{file}, line 2: not UTF-8 text")


def test_ordinary_rows_are_read_as_pythons_json_reads_them() -> None:
    rows = [
        {"prompt": "a\0\U0001f600", "n": [1, -2.5e-3, 10**300, True, None], "nested": [[[[{"": {}}]]]]},
        [],
        "x",
        0.1,
    ]
    for row in rows:
        for text in (json.dumps(row), json.dumps(row, ensure_ascii=False)):
            assert json_text.read_strictly(b"\xef\xbb\xbf" + text.encode() + b" \r\n") == row
    assert json_text.read_strictly(json.dumps("\\ud800").encode()) == "\\ud800"
    assert json_text.read("[NaN]") != [0]


def nested(depth: int, wrap: Callable[[Any], Any]) -> pa.Table:
    kind: Any = pa.int32()
    for _ in range(depth):
        kind = wrap(kind)
    return pa.table({"prompt": pa.array([None], type=kind)})


def as_text(raw: list[bytes]) -> pa.Array:
    return pa.Array.from_buffers(pa.string(), len(raw), pa.array(raw, pa.binary()).buffers())


TABLES = {
    "nested lists": (lambda: nested(500, pa.list_), ": not a readable Parquet file: .* too deeply nested"),
    "nested structs": (lambda: nested(500, lambda kind: pa.struct([("a", kind)])), ": .* too deeply nested"),
    "text that is none": (
        lambda: pa.table({"prompt": as_text([b"a"] * 700 + [b"\xed\xa0\x80"])}),
        ", row 700: Unicode",
    ),
    "a time of another age": (
        lambda: pa.table({"prompt": ["a"] * 9, "at": pa.array([0] * 8 + [2**60], pa.timestamp("ms"))}),
        ", row 8: ",
    ),
    "two columns of a name": (
        lambda: pa.table([["a"], ["b"]], names=["prompt", "prompt"]),
        ": there are two columns 'prompt'",
    ),
}


@pytest.mark.parametrize(("table", "words"), TABLES.values(), ids=TABLES)
def test_a_hostile_parquet_file_is_refused_with_its_row(
    tmp_path: Path, table: Callable[[], pa.Table], words: str
) -> None:
    file = tmp_path / "rows.parquet"
    pq.write_table(table(), file)
    told = refused(lambda: load_table(DataSource(path=str(file)), seed=1), DataError)
    assert told.startswith(str(file))
    with pytest.raises(DataError, match=words):
        load_table(DataSource(path=str(file)), seed=1)


# ---- recipes and overrides


def bomb(levels: int, each: int = 9) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(levels):
        lines.append(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * each)}]")
    return "\n".join(lines) + "\n"


SIGNS = MAX_BYTES - 100
MANY = f"line 1.* more than {MAX_NODES:,} values"
RECIPES = {
    "aliases": (bomb(8), f"line 5: its aliases .* stand for more than {MAX_NODES:,} values"),
    "aliases of mappings": (
        "a0: &a0 {k: v}\n"
        + "".join(f"a{i + 1}: &a{i + 1} {{{', '.join(f'k{j}: *a{i}' for j in range(9))}}}\n" for i in range(8)),
        "line 5: its aliases",
    ),
    "merged aliases": (
        "a0: &a0 {k: v}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(8)),
        "line 5: its aliases",
    ),
    "an alias inside of itself": ("a: &a [*a]\n", "line 1: an alias inside of what it stands for"),
    "nested lists": ("a: " + "[" * SIGNS, "line 1, column 10[0-9]: not valid YAML: more than 100 brackets"),
    "nested mappings": ("a: " + "{b: " * (SIGNS // 4), "line 1, .* more than 100 brackets"),
    "nested blocks": ("\n".join(" " * i + "a:" for i in range(700)), "line 102, .* more than 100 lists and mappings"),
    "nested block lists": ("- " * (SIGNS // 2) + "a", "line 1, .* more than 100 lists and mappings"),
    "question marks": ("? " * (SIGNS // 2), "line 1, .* more than 100 lists and mappings"),
    "many values": ("a: [" + "x, " * (SIGNS // 3) + "x]", MANY),
    "anchors": ("\n".join(f"- &a{i} x" for i in range(20_000)), f"more than {MAX_NODES:,} values"),
    "aliases in a row": ("a: &a x\nb: [" + "*a, " * (SIGNS // 4) + "]", f"line 2, .* more than {MAX_NODES:,} values"),
    "a number of 5,000 digits": ("seed: 1\nnum_steps: " + "9" * 5000, "line 2: num_steps: 9+.. has too many digits"),
    "a hexadecimal number without end": ("seed: 0x" + "f" * SIGNS, "line 1: seed: 0xf+.. has too many digits"),
    "a number beyond a float": (
        "seed: 1\nalgorithm:\n  beta: 1e999\n",
        "line 3: beta: 1e999 is beyond what a float can hold",
    ),
    "half of a character": ('name: "\\ud800"\n', "line 1: .* half of a character"),
    "a NUL": ("name: a\0b\n", "line 1: not valid YAML: the character #x0000"),
    "a key that is given twice": ("seed: 1\nname: x\nseed: 2\n", "'seed' is given twice, in line 1 and in line 3"),
    "a tag of Python": ("name: !!python/object/apply:os.system [id]\n", "line 1: the tag .* can't be used"),
    "a huge file": ("name: " + "x" * MAX_BYTES, f"and a recipe has at most {MAX_BYTES:,}"),
    "a line of one sign": ("a" * SIGNS, "expected a mapping"),
    "quotes without end": ('name: "' + "\\n" * (SIGNS // 2), "line 1, .* not valid YAML"),
    "colons": (":" * SIGNS, "line 1, .* not valid YAML"),
    "dashes": ("-" * SIGNS + "\n", "expected a mapping"),
}


@pytest.mark.parametrize(("text", "words"), RECIPES.values(), ids=RECIPES)
def test_a_hostile_recipe_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    told = refused(lambda: load_recipe(RunConfig, str(file), []), ConfigError)
    assert told.startswith(str(file))
    assert re.search(words, told), told
    assert len(told) < len(str(file)) + 300


def test_aliases_that_stand_for_much_take_no_memory(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(bomb(30))
    tracemalloc.start()
    try:
        refused(lambda: load_yaml(file), ConfigError)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


OVERRIDES = {
    "nested lists": "reward.functions=" + "[" * DEEP + "]" * DEEP,
    "nested mappings": "data.train.args=" + "{a: " * DEEP + "}" * DEEP,
    "nested sections": ".".join(["a"] * DEEP) + "=1",
    "aliases": "data.train.args={a: &a [x, x], b: &b [*a, *a, *a, *a], c: &c [*b, *b, *b, *b], d: &d [*c, *c, *c, *c], "
    "e: &e [*d, *d, *d, *d], f: &f [*e, *e, *e, *e], g: &g [*f, *f, *f, *f], h: [*g, *g, *g, *g]}",
    "a number of 5,000 digits": "seed=" + "9" * 5000,
    "a number beyond a float": "algorithm.beta=1e999",
    "no number": "algorithm.beta=.nan",
    "half of a character": "name=\ud800",
    "half of a character, escaped": 'name="\\ud800"',
    "brackets that close nothing": "reward.functions=[" + "]" * DEEP,
    "quotes": 'seed="' + "'" * DEEP + '"',
    "a tag of Python": "data.train.args={a: !!python/name:os.system x}",
}


@pytest.mark.parametrize("override", OVERRIDES.values(), ids=OVERRIDES)
def test_a_hostile_override_is_refused_with_its_key(override: str) -> None:
    told = refused(lambda: build(RunConfig, parse_overrides([override]), "the overrides"), ConfigError)
    assert override.partition("=")[0][:40] in told
    assert len(told) < 1000


# ---- what a run has left

LINES = [
    *(
        "[" * DEEP,
        '{"step": 2, "a": ' + "[" * DEEP + "]" * DEEP + "}",
        '{"step": ' + "9" * 5000 + "}",
        '{"step": 2, "a": "b"}',
    ),
    *(
        '{"step": 1e999}',
        '{"step": NaN}',
        '{"step": true}',
        '{"step": -1}',
        '{"step": ' + "9" * 300 + "}",
        '{"step": 2, "a": 1e999}',
    ),
    *(
        '{"step": 2, "a": NaN}',
        '{"step": 2, "a": {}}',
        "\0" * 1000,
        '"' + "x" * 100_000,
        "null",
        "{}",
        '{"step": [1]}',
        "\ud800",
    ),
]
"""Of a file of JSON lines."""


def test_metrics_that_no_run_writes_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = ['{"step": 1, "loss/policy": 0.5}', '{"step": 3, "loss/policy": null}']
    path.write_bytes("\n".join([good[0], *LINES, good[1], ""]).encode("utf-8", "surrogatepass"))
    assert at_once(lambda: read_metrics(path)) == [json.loads(line) for line in good]


def test_a_trace_and_messages_that_no_run_writes_are_passed_over(tmp_path: Path) -> None:
    event: dict[str, Any] = {
        "ph": "X",
        "name": "step 1",
        "ts": 0,
        "dur": 5,
        "cat": "controller",
        "pid": 1,
        "tid": 1,
        "args": {"step": 1},
    }
    wrong: list[dict[str, Any]] = [
        {},
        {"args": 1},
        {"ts": "0"},
        {"dur": 10**400},
        {"name": None},
        {"args": {"step": "1"}},
        {"pid": 1e999},
        {"ph": "Q"},
    ]
    lines = [json.dumps(event), *LINES, *(json.dumps({**event, **change} if change else {}) for change in wrong)]
    (tmp_path / "trace.json").write_bytes(b"[\n" + ",\n".join(lines).encode("utf-8", "surrogatepass") + b"\n]\n")
    assert at_once(lambda: list(read_trace(tmp_path / "trace.json"))) == [event]
    message = {"step": 1, "time": 0.0, "level": "info", "text": "so"}
    told = [
        json.dumps(message),
        *LINES,
        json.dumps({**message, "step": 1e999}),
        json.dumps({**message, "time": 10**400}),
    ]
    (tmp_path / "messages.jsonl").write_bytes("\n".join(told).encode("utf-8", "surrogatepass"))
    assert [m.text for m in at_once(lambda: read_messages(tmp_path))] == ["so"]


@pytest.mark.parametrize(
    "content", [*LINES, '{"status": "failed", "text": "", "step": "9", "total_steps": 1, "length": []}']
)
def test_an_end_that_no_run_writes_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "ended.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert at_once(lambda: read_ended(tmp_path)) is None


CONFIGS = [
    "model: text\n",
    "data: [1, 2]\n",
    "data: {train: 7}\n",
    "rollout: null\nlearner: 3\n",
    "model: {tiny: yes}\n",
]


@pytest.mark.parametrize("config", [bomb(8), *CONFIGS])
def test_a_report_of_what_no_run_writes_is_an_error_or_a_report(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step": 1.0}\n')
    if config == "rollout: null\nlearner: 3\n":
        assert at_once(lambda: write_report(tmp_path)).is_file()
    else:
        assert str(tmp_path) in refused(lambda: write_report(tmp_path), GrpoRayError)


def test_a_report_of_files_that_are_none_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    file = tmp_path / "rollouts" / "step-000001.parquet"
    file.write_bytes(b"PAR1" + bytes(100))
    assert str(file) in refused(lambda: write_report(tmp_path), DataError)
    pq.write_table(pa.table({"prompt_id": [1]}), file)
    assert f"{file} holds no rollouts" in refused(lambda: write_report(tmp_path), DataError)


@pytest.mark.parametrize("content", [b"\0" * 5000, b"SQLite format 3\0" + b"\xff" * 5000, b"[" * DEEP])
def test_what_is_no_ledger_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    assert refused(lambda: last_trained(path), CheckpointError).startswith(f"{path} is no ledger")
    assert refused(lambda: Ledger(path), CheckpointError).startswith(f"{path} is no ledger")


@pytest.mark.parametrize("content", ["[" * DEEP, "9" * 5000, "[]", "{}", '{"model": 1}', "\0"])
def test_samples_and_records_that_nobody_wrote_are_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples.json").write_text(content)
    assert str(tmp_path / "samples.json") in refused(lambda: list(read_samples(tmp_path / "samples")), DataError)
    (tmp_path / "pipeline.json").write_text(content)
    assert str(tmp_path / "pipeline.json") in refused(lambda: Record.open(tmp_path), CheckpointError)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"group": [1], "loss_mask": [True], "temperature": ["hot"]}),
        pa.table({"order": [1], "score": ["[" * DEEP]}),
    ],
    ids=["other columns", "nested JSON"],
)
def test_a_batch_or_groups_that_nobody_wrote_are_told(tmp_path: Path, table: pa.Table) -> None:
    file = tmp_path / "step-000001.parquet"
    pq.write_table(table, file)
    assert str(file) in refused(lambda: read_batch(file), CheckpointError)
    assert str(file) in refused(lambda: read_groups(file), CheckpointError)


def test_the_kind_of_a_recipe_is_told_by_no_more_than_a_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("[" * DEEP)
    (tmp_path / "recipe.yaml").write_text(f"data: {{train: {{path: {file}}}}}\n")
    assert at_once(lambda: kind_of(tmp_path / "recipe.yaml")) == "sft"
