"""Which rows share words with a test set, and what is written then."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_ray.data import Table
from grpo_ray.decontaminate import find_contaminated, ngram_hashes, ngrams, words_of, write_jsonl
from grpo_ray.errors import ConfigError, DataError
from launch.cli import app

TEST = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May."


def contaminated(prompts: list[str], tests: list[str], n: int) -> list[tuple[int, str]]:
    table = Table("t", "t.jsonl", [{"prompt": p} for p in prompts])
    return [(c.row, c.shared) for c in find_contaminated(table, None, ngram_hashes(tests, n), n)]


def test_words_are_compared_without_case_space_and_sentence_marks_but_with_signs() -> None:
    assert words_of('  "Two (2)\n APPLES, cost\t$1.50 ... ; right?" ') == [
        "two",
        "2",
        "apples",
        "cost",
        "$1.50",
        "right",
    ]
    assert words_of("7 - 5 = -2") == ["7", "-", "5", "=", "-2"]


def test_ten_words_in_a_row_are_too_many_and_nine_are_not() -> None:
    words = TEST.split()
    nine, ten = " ".join(words[3:12]), " ".join(words[3:13])
    rows = [f"Once upon a time. {nine} and so it went on", f"Once upon a time! {ten.upper()}?? and so it went on"]
    assert contaminated(rows, [TEST], 10) == [(1, "to 48 of her friends in april and then she")]
    assert [row for row, _ in contaminated(rows, [TEST], 9)] == [0, 1]


def test_a_short_prompt_is_compared_whole() -> None:
    tests = ["What is 7 - 5?", TEST]
    rows = ["what is 7 - 5", "What is 7 + 5?", "What is 7 - 5 ?", "So what is 7 - 5?", "She sold half as many", ""]
    assert [row for row, _ in contaminated(rows, tests, 10)] == [0, 2]


def test_a_text_has_one_ngram_for_each_place_it_can_start() -> None:
    assert [len(list(ngrams(["w"] * size, 3))) for size in (0, 1, 2, 3, 4, 10)] == [0, 1, 1, 1, 2, 8]


def test_the_hashes_find_what_a_search_through_the_words_finds() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(300)]
    rows, tests, n = texts[:200], texts[200:], 5

    def slow(row: str) -> bool:
        short = len(row.split()) < n
        return any(row == t if short else _shares(row.split(), t.split(), n) for t in tests)

    found = {row for row, _ in contaminated(rows, tests, n)}
    assert found == {i for i, row in enumerate(rows) if slow(row)}
    assert 20 < len(found) < 180


def _shares(one: list[str], other: list[str], n: int) -> bool:
    pieces = {tuple(other[i : i + n]) for i in range(len(other) - n + 1)}
    return any(tuple(one[i : i + n]) in pieces for i in range(len(one) - n + 1))


def test_answers_in_a_conversation_do_not_count() -> None:
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": TEST}]},
        {"messages": [{"role": "system", "content": "hello"}, {"role": "user", "content": TEST}]},
    ]
    found = find_contaminated(Table("t", "t", rows), None, ngram_hashes([TEST], 10), 10)
    assert [c.row for c in found] == [1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def rows() -> list[dict[str, object]]:
        return [{"a": 1}, {"a": "é"}]

    path = tmp_path / "out.jsonl"
    assert write_jsonl(path, rows()) == 2
    with pytest.raises(ZeroDivisionError):
        write_jsonl(path, ({"a": 1 // (1 - i)} for i in range(3)))
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows()
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(DataError, match="--out"):
        write_jsonl(tmp_path / "nowhere" / "out.jsonl", rows())


# The command.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train = [
        {"q": f"In other words, {TEST}", "answer": 1},
        {"q": "something else", "answer": 2},
        {"q": TEST, "answer": 3},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in train))
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": TEST}) + "\n")
    return tmp_path


def command(*args: str) -> str:
    result = CliRunner().invoke(app, ["decontaminate", *args], catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.output


def test_kept_rows_are_written_beside_the_training_data(folder: Path) -> None:
    args = ["train.jsonl", "--against", "test.jsonl", "--column", "q", "--against-column", "question"]
    output = command(*args)
    assert "test.jsonl: 1 prompts, 10 different 10-grams" in output
    assert "removed  train.jsonl, line 1: 'natalia sold clips to 48 of her friends in april'" in output
    assert "removed  2 of 3 rows of train.jsonl (66.67%)" in output
    kept = (folder / "train.decontaminated.jsonl").read_text()
    assert [json.loads(line) for line in kept.splitlines()] == [{"q": "something else", "answer": 2}]
    command(*args, "--ngram", "30", "--out", "other.jsonl")
    assert len((folder / "other.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "error", "expected"),
    [
        (["--column", "q", "--against-column", "x"], DataError, "test.jsonl, line 1: no column 'x'"),
        ([], DataError, "--column"),
        (["--column", "q", "--against-column", "question", "--out", "train.jsonl"], ConfigError, "one of the files"),
        (["--against", "train.jsonl", "--column", "q", "--against-column", "q"], DataError, "line 1: no column 'q'"),
    ],
)
def test_what_it_cannot_do_is_told_and_nothing_is_written(
    folder: Path, args: list[str], error: type[Exception], expected: str
) -> None:
    with pytest.raises(error, match=expected):
        command("train.jsonl", "--against", "test.jsonl", *args)
    assert sorted(p.name for p in folder.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_a_test_set_that_is_the_training_set_leaves_nothing_and_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="every one of the 3 rows"):
        command("train.jsonl", "--against", "train.jsonl", "--column", "q")
    assert not (folder / "train.decontaminated.jsonl").exists()
