"""Which rows share words with a test set, and what is written then."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grpo_ray.data.decontaminate import find_contaminated, ngram_hashes, ngrams, size_of, words_of, write_jsonl
from grpo_ray.data.sources import Table
from grpo_ray.errors import ConfigError, DataError
from launch.cli import app
from tests.cpu_time import cpu_below

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


def test_a_short_test_prompt_is_looked_for_whole_and_anywhere() -> None:
    tests = ["What is 7 - 5?", TEST]
    long = f"Tell me {'slowly and in plain words ' * 9}what is 7 - 5, and why"
    rows = [
        "what is 7 - 5",
        "What is 7 + 5?",
        "What is 7 - 5 ?",
        "So what is 7 - 5?",
        "She sold half as many",
        "",
        long,
    ]
    assert contaminated(rows, tests, 10) == [
        (0, "what is 7 - 5"),
        (2, "what is 7 - 5"),
        (3, "what is 7 - 5"),
        (6, "what is 7 - 5"),
    ]


def test_a_test_prompt_of_a_word_or_two_is_only_found_as_a_whole_row() -> None:
    rows = ["yes", "Yes!", "yes it is", "I would say yes to that, and so would all others here", "Why not?", "好"]
    found = contaminated(rows, ["Yes", "why not", "好", "", "?"], 10)
    assert [row for row, _ in found] == [0, 1, 4, 5]
    assert [row for row, _ in contaminated(rows, ["yes it is"], 10)] == [2]


def test_short_prompts_of_many_lengths_that_begin_alike_are_all_found() -> None:
    tests = ["how many apples are there", "how many apples", "how many apples are there in all today"]
    rows = ["now how many apples are there in all today", "say how many apples", "how many pears", "how many"]
    assert [row for row, _ in contaminated(rows, tests, 10)] == [0, 1]


WRITTEN_OTHERWISE = {
    "full-width letters": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in TEST),
    "no-width spaces": TEST.replace("a", "a\u200b").replace("s ", "s\ufeff "),
    "joiners": TEST.replace("e", "e\u2060\u200d"),
    "soft hyphens": TEST.replace("ol", "o\u00adl"),
    "variation selectors": TEST.replace("n", "n\ufe0f\U000e0101"),
    "control characters": TEST.replace("r", "r\x00\x08"),
    "marks of direction": f"\u202b{TEST}\u202c",
    "other spaces": TEST.replace(" ", "\u00a0\u2003"),
    "ideographic spaces": TEST.replace(" ", "\u3000"),
    "bold": TEST.replace("clips", "**clips**").replace("48", "__48__"),
    "mathematical letters": TEST.replace(
        "Natalia", "\U0001d40d\U0001d41a\U0001d42d\U0001d41a\U0001d425\U0001d422\U0001d41a"
    ),
    "accents": TEST.replace("Natalia", "Nat\u00e1lia").replace("half", "ha\u0301lf"),
    "a ligature": TEST.replace("clips", "clip\u017f"),
    "capitals": TEST.upper(),
    "quotation marks": f"\u201c{TEST}\u201d \u00ab",
}


@pytest.mark.parametrize("how", WRITTEN_OTHERWISE)
def test_the_same_words_are_found_however_they_are_written(how: str) -> None:
    other = WRITTEN_OTHERWISE[how]
    assert other != TEST
    assert contaminated([f"First. {other}"], [TEST], 10) == [(0, "natalia sold clips to 48 of her friends in april")]
    assert [row for row, _ in contaminated([f"First. {TEST}"], [other], 10)] == [0]
    assert contaminated([f"First. {other}"], [TEST], 18) != []


def test_signs_and_apostrophes_have_one_form_and_are_not_lost() -> None:
    assert words_of("don\u2019t 7 \u2212 5 \u2013 2 * 3 \u00bd x\u00b2 **so** _x_") == [
        *("don't", "7", "-", "5", "-", "2", "*", "3", "1/2", "x2", "so", "x"),
    ]
    assert contaminated(["compute 7 + 5 now"], ["compute 7 - 5 now"], 10) == []


CHINESE = "小明有五个苹果\uff0c他给了小红两个\uff0c还剩几个\uff1f"


def test_chinese_characters_are_words() -> None:
    assert words_of("小明有50个 apples\uff0c对\uff1f\u300a书\u300b") == [
        *("小", "明", "有", "50", "个", "apples", "对", "书"),
    ]
    rows = [
        f"请回答\uff1a{CHINESE}谢谢",
        "Please answer:" + CHINESE.replace("\uff0c", ", ").replace("个", "个 "),
        CHINESE[2:12] + "\u3002",
        CHINESE[2:13] + "\u3002",
        "小明有五个梨\uff0c他吃了两个\uff0c还剩几个\uff1f",
    ]
    # Nine characters in a row are too few: the comma is no word.
    assert [row for row, _ in contaminated(rows, [CHINESE], 10)] == [0, 1, 3]
    short = "一加一等于几"
    assert [row for row, _ in contaminated([f"{CHINESE}{short}\uff1f{CHINESE}", CHINESE], [f"{short}\uff1f"], 10)] == [
        0
    ]


def test_kana_and_thai_signs_are_a_third_of_a_word() -> None:
    thai = "จงหาค่าของผลบวกของจำนวนเต็มบวกทั้งหมดที่น้อยกว่าร้อย"
    kana = "りんごがいくつありますか"
    assert [size_of(words_of(t)) for t in ("あいう", "漢字か", "two words")] == [1, 7 / 3, 2]
    rows = [
        f"ถาม {thai} 7",
        thai[:12] + " 7",
        f"では\u3001{kana}\uff1f教えて",
        kana[:5],
    ]
    assert [row for row, _ in contaminated(rows, [thai, kana], 10)] == [0, 2]


@pytest.mark.timeout(300)
def test_hostile_rows_take_time_in_proportion_to_their_length() -> None:
    tests = [TEST, *("x " * size for size in range(3, 10)), "a\u0315\u0300 " * 5]
    rows = [
        "a" + "\u0315\u0300" * 16_000,
        "a" + "\u0345" * 16_000 + "\u0334" * 16_000,
        "x " * 16_000,
        "\u200b" * 32_000,
    ]
    rows += [
        "\ufdfa" * 32_000,
        "中" * 32_000,
        "*" * 32_000,
        "*_" * 16_000,
        '"' * 32_000,
        "." * 32_000,
        "ก" * 32_000,
    ]
    with cpu_below(25):
        assert [row for row, _ in contaminated(rows, tests, 10)] == [2]


def test_a_text_has_one_ngram_for_each_place_it_can_start() -> None:
    assert [len(list(ngrams(["w"] * size, 3))) for size in (0, 1, 2, 3, 4, 10)] == [0, 1, 1, 1, 2, 8]


def test_the_hashes_find_what_a_search_through_the_words_finds() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abc", k=rng.randint(1, 12))) for _ in range(300)]
    rows, tests, n = texts[:200], texts[200:], 5

    def slow(row: str) -> bool:
        return any(_shares(row.split(), t.split(), min(n, len(t.split()))) for t in tests if len(t) > 3 or row == t)

    found = {row for row, _ in contaminated(rows, tests, n)}
    assert found == {i for i, row in enumerate(rows) if slow(row)}
    assert 20 < len(found) < 190


def _shares(one: list[str], other: list[str], n: int) -> bool:
    pieces = {tuple(other[i : i + n]) for i in range(len(other) - n + 1)}
    return any(tuple(one[i : i + n]) in pieces for i in range(len(one) - n + 1))


def test_immediate_future_in_a_conversation_do_not_count() -> None:
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
    other = [json.dumps({"question": q}) for q in ("Why?", TEST, f"{TEST} {TEST} How many?")]
    (folder / "test.jsonl").write_text("\n".join(other))
    output = command(*args, "--ngram", "30", "--out", "other.jsonl")
    assert (
        "test.jsonl: 3 prompts, 11 different 30-grams, 1 prompts of fewer words, looked for whole in every row, 1 of fewer than 3 "
        "words, found only where they are the whole row"
    ) in output
    assert len((folder / "other.jsonl").read_text().splitlines()) == 1


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
