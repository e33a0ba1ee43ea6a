"""Data sets, templates and the cursor: what comes out is exact, and what can't be used says where and why."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.config.data import DataConfig, DataSource
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.prompts import EVAL_SEED_OFFSET, load_demonstrations, load_prompts, trained_on
from grpo_ray.data.sources import load_table, progress
from grpo_ray.data.templates import R1_SYSTEM
from grpo_ray.data.tokenized import TokenLists
from grpo_ray.errors import DataError
from tests.cpu_time import cpu_below

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict[str, Any]], name: str = "sums.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def sums(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{i}+{i}", "answer": str(2 * i)} for i in range(n)]


def config(path: str, **other: Any) -> DataConfig:
    train = DataSource(path=path, columns=other.pop("columns", {}), limit=other.pop("limit", None))
    return DataConfig(train=train, **{"template": "raw", **other})


class Numbers:
    """The smallest data set that a cursor can walk over."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fingerprint = f"numbers-{size}"

    def __len__(self) -> int:
        return self.size

    def item(self, index: int, epoch: int) -> tuple[int, int]:
        return epoch, index


def take(cursor: Cursor[Any], n: int) -> list[Any]:
    return [cursor.next() for _ in range(n)]


# The cursor


@given(size=st.integers(1, 40), cut=st.integers(0, 130), seed=st.integers(-5, 2**63), shuffle=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_resumed_cursor_goes_on_as_if_never_stopped(size: int, cut: int, seed: int, shuffle: bool) -> None:
    whole = take(Cursor(Numbers(size), seed=seed, shuffle=shuffle), 130 + 3 * size)
    first = Cursor(Numbers(size), seed=seed, shuffle=shuffle)
    before = take(first, cut)
    state = json.loads(json.dumps(first.state_dict()))
    second = Cursor(Numbers(size), seed=seed, shuffle=shuffle)
    second.load_state_dict(state)
    assert second.num_taken == cut
    assert before + take(second, len(whole) - cut) == whole


def test_every_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    cursor = Cursor(Numbers(50), seed=3)
    epochs = [take(cursor, 50) for _ in range(4)]
    for number, epoch in enumerate(epochs):
        assert [e for e, _ in epoch] == [number] * 50
        assert sorted(i for _, i in epoch) == list(range(50))
    orders = {tuple(i for _, i in epoch) for epoch in epochs}
    assert len(orders) == 4
    other_seed = [i for _, i in take(Cursor(Numbers(50), seed=4), 50)]
    assert tuple(other_seed) not in orders


def test_the_order_of_a_seed_is_the_same_on_every_machine() -> None:
    assert [i for _, i in take(Cursor(Numbers(8), seed=1), 16)] == [2, 4, 7, 5, 0, 6, 3, 1, 5, 6, 3, 0, 7, 2, 1, 4]


def test_without_shuffling_the_order_is_the_file_s() -> None:
    assert take(Cursor(Numbers(3), seed=1, shuffle=False), 5) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_resuming_with_other_data_is_refused(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    def cursor(rows: list[dict[str, Any]], seed: int = 1) -> Cursor[Any]:
        return Cursor(load_prompts(config(jsonl(rows)), tokenizer, seed=1).train, seed=seed)

    state = cursor(sums(5)).state_dict()
    cursor(sums(5)).load_state_dict(state)
    changed_answer = [*sums(4), {"prompt": "4+4", "answer": "9"}]
    changed_prompt = [*sums(4), {"prompt": "4+5", "answer": "8"}]
    for rows in (sums(6), changed_answer, changed_prompt, sums(5)[::-1]):
        with pytest.raises(DataError, match=r"not those of the saved run.*fingerprint was"):
            cursor(rows).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 1, is 2"):
        cursor(sums(5), seed=2).load_state_dict(state)


# Sources


def test_a_malformed_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in sums(20)]
    lines[16] = '{"prompt": "8+8", "answer" "16"}'
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"bad\.jsonl, line 17: not valid JSON: Expecting ':' delimiter at column 28"):
        load_table(DataSource(path=str(path)), seed=1)


def test_blank_lines_are_allowed_and_still_count_as_lines(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "gaps.jsonl"
    path.write_text('\n{"prompt": "a"}\n   \n\n{"question": "b"}\n')
    assert len(load_table(DataSource(path=str(path)), seed=1).rows) == 2
    with pytest.raises(
        DataError, match=r"gaps\.jsonl, line 5: no column 'prompt' or 'messages'; columns there: question"
    ):
        load_prompts(config(str(path)), tokenizer, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n["b"]\n', r"line 2: expected a JSON object .* got list"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', r"line 2: not UTF-8"),
        (b"", r"the data set is empty"),
        (b"\n\n", r"the data set is empty"),
    ],
)
def test_an_unusable_file_says_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_table(DataSource(path=str(path)), seed=1)


@pytest.mark.parametrize("kind", ["image", "image_url", "video", "audio"])
def test_a_prompt_with_more_than_text_is_refused_by_what_it_has(
    kind: str, jsonl: Callable[..., str], tokenizer: Any
) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind}]
    path = jsonl([{"prompt": "1+1"}, {"prompt": [{"role": "user", "content": parts}]}])
    with pytest.raises(
        DataError, match=rf"sums\.jsonl, line 2, .*message 0: it has a part of type {kind}, and only text"
    ):
        load_prompts(config(path), tokenizer, seed=1)


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"trian\.jsonl: no such file; did you mean .*train\.jsonl"):
        load_table(DataSource(path=str(tmp_path / "trian.jsonl")), seed=1)
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(DataError, match=r"can't read this kind of file; expected \.jsonl or \.parquet"):
        load_table(DataSource(path=str(tmp_path / "train.txt")), seed=1)


def test_parquet_and_saved_hugging_face_data_give_the_same_rows_as_jsonl(
    tmp_path: Path, jsonl: Callable[..., str]
) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"p{i}", "metadata": {"answer": i}, "tags": ["x", "y"]} for i in range(7)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([6])}).save_to_disk(str(tmp_path / "splits"))
    for path in (jsonl(rows), str(tmp_path / "rows.parquet"), str(tmp_path / "saved"), str(tmp_path / "splits")):
        table = load_table(DataSource(path=path, limit=5), seed=1)
        assert list(table.rows) == rows[:5], path
        assert table.where(3).startswith(f"{path}, ")
    assert list(load_table(DataSource(path=str(tmp_path / "splits"), split="test"), seed=1).rows) == [rows[6]]
    with pytest.raises(DataError, match="no split 'validation'; it has: train, test"):
        load_table(DataSource(path=str(tmp_path / "splits"), split="validation"), seed=1)


def test_broken_parquet_and_unreachable_hub_data_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"x\.parquet: not a readable Parquet file: ArrowInvalid: \w"):
        load_table(DataSource(path=str(tmp_path / "x.parquet")), seed=1)
    with pytest.raises(DataError, match=r"data set 'nobody/no-such-data' .* can't be loaded: .*from there: a network"):
        load_table(DataSource(path="nobody/no-such-data"), seed=1)


def test_reasoning_gym_rows_carry_their_entry_and_task(tokenizer: Any) -> None:
    source = DataSource(
        path="reasoning_gym:chain_sum",
        args={"size": 9, "seed": 5, "min_terms": 2, "max_terms": 2},
        columns={"prompt": "metadata.expression", "gold": "metadata.source_index"},
    )
    prompts = list(load_prompts(DataConfig(train=source, template="raw"), tokenizer, seed=1).train)
    assert [p.id for p in prompts] == [f"chain_sum/0/{i}" for i in range(9)]
    some = load_table(source.model_copy(update={"limit": 4}), seed=1)
    assert [row["question"] for row in some.rows] == [p.columns["question"] for p in prompts[:4]]
    assert some.where(2) == "reasoning_gym:chain_sum, row 2"
    for i, p in enumerate(prompts):
        assert p.columns["reasoning_gym_task"] == "chain_sum"
        assert p.columns["reasoning_gym_entry"]["answer"] == p.columns["answer"]
        assert p.columns["metadata"]["expression"] == p.text
        assert p.columns["gold"] == i
        assert "prompt" not in p.columns


def test_a_generator_without_a_seed_follows_the_run_s_and_eval_is_other_rows(tokenizer: Any) -> None:
    def load(seed: int) -> tuple[list[str], list[str]]:
        source = DataSource(path="reasoning_gym:chain_sum", args={"size": 50})
        data = DataConfig(train=source, eval=source, template="raw", exclude_eval=False)
        sets = load_prompts(data, tokenizer, seed=seed)
        return [p.text for p in sets.train], [p.text for p in sets.eval[""]]

    train, held_out = load(1)
    assert load(1) == (train, held_out)
    assert load(2)[0] != train
    assert len(set(train) & set(held_out)) <= 2


@pytest.mark.parametrize(
    ("path", "args", "message"),
    [
        ("reasoning_gym:chain_sums", {}, "no task 'chain_sums'; did you mean chain_sum"),
        ("reasoning_gym:chain_sum", {"terms": 2}, "refused.*it takes: min_terms, max_terms"),
        ("reasoning_gym:chain_sum", {"min_terms": 5, "max_terms": 2}, r"are refused: AssertionError: \w"),
        ("python:flawed", {}, "expected python:module.function"),
        ("python:no.such.module", {}, "there is no module 'no'"),
        ("python:grpo_ray.tasks.arithmetic.flawed_demonstration", {}, "did you mean 'flawed_demonstrations'"),
        ("python:grpo_ray.tasks.arithmetic.flawed_demonstrations", {"sice": 3}, "unexpected keyword argument 'sice'"),
    ],
)
def test_a_generator_that_can_t_run_says_what_to_change(path: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_table(DataSource(path=path, args=args), seed=1)


def test_a_module_under_a_name_that_is_taken_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"python:actors\.mine\.rows: actors\.mine is grpo-ray's own; of its modules recipes name"
    ):
        load_table(DataSource(path="python:actors.mine.rows"), seed=1)


def test_a_function_beside_the_user_gives_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rows_here.py").write_text("def rows(n):\n    return ({'prompt': str(i)} for i in range(n))\n")
    monkeypatch.chdir(tmp_path)
    table = load_table(DataSource(path="python:my_rows_here.rows", args={"n": 10}, limit=4), seed=1)
    assert (table.name, list(table.rows)) == ("rows", [{"prompt": str(i)} for i in range(4)])


SPLITS = "has no split 'test'; it has: train, and a part of one is train[:50%] or train[100:200]"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"path": "rows.txt"}, "rows.txt: can't read this kind of file; expected .jsonl or .parquet"),
        (
            {"path": "rows.jsonl", "name": "main"},
            "rows.jsonl: name 'main' is a subset of a Hugging Face data set, and this has none; take it out",
        ),
        (
            {"path": "python:rows_of_here.good", "name": "main"},
            "python:rows_of_here.good: name 'main' is a subset of a Hugging Face data set, and this has none; take it out",
        ),
        (
            {"path": "rows.jsonl", "args": {"n": 3}},
            "rows.jsonl: args {'n': 3} are a generator's (reasoning_gym:TASK, python:module.function); take them out "
            "(over a recipe that has some: data.train.args={})",
        ),
        ({"path": "rows.jsonl", "split": "test"}, f"rows.jsonl {SPLITS}; for another split name another file"),
        ({"path": "python:rows_of_here.good", "split": "test"}, f"python:rows_of_here.good {SPLITS}"),
        ({"path": "full.jsonl"}, "full.jsonl is a folder: name the file in it, e.g. full.jsonl/a.parquet"),
        ({"path": "bare.jsonl"}, "bare.jsonl is a folder without data files in it"),
        ({"path": "HERE/rwos.jsonl"}, "HERE/rwos.jsonl: no such file; did you mean HERE/rows.jsonl?"),
        ({"path": "HERE/none/a.jsonl"}, "HERE/none/a.jsonl: no such file (looked from HERE)"),
        ({"path": "latin.jsonl"}, "latin.jsonl, line 2: not UTF-8 text (invalid start byte at byte 12)"),
        ({"path": "broken.jsonl"}, "broken.jsonl, line 3: not valid JSON: Expecting value at column 12"),
        (
            {"path": "list.jsonl"},
            'list.jsonl, line 1: expected a JSON object such as {"prompt": "..."}, got list',
        ),
        (
            {"path": "saved", "name": "main"},
            "data set 'saved' was saved to disk, without subsets: take name 'main' out",
        ),
        ({"path": "python:rows"}, "python:rows: expected python:module.function"),
        (
            {"path": "python:rows_of_here.godo"},
            "python:rows_of_here.godo: module 'rows_of_here' has no 'godo'; did you mean 'good'?",
        ),
        (
            {"path": "python:rows_of_here.zzz"},
            "python:rows_of_here.zzz: module 'rows_of_here' has no 'zzz'; it has bad, good",
        ),
        ({"path": "python:rows_of_here.VALUE"}, "python:rows_of_here.VALUE: 'VALUE' is a int, expected a function"),
        (
            {"path": "python:rows_of_here.bad"},
            "python:rows_of_here.bad, row 1: expected a dict such as {'prompt': ...}, got str",
        ),
        (
            {"path": "python:rows_of_here.good", "args": {"m": 1}},
            "python:rows_of_here.good: calling it with args {'m': 1} failed: good() got an unexpected keyword argument 'm'",
        ),
    ],
)
def test_a_source_that_can_t_be_read_is_told_with_the_mend(
    source: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "rows.txt": b"",
        "rows.jsonl": b'{"prompt": "a"}\n',
        "full.jsonl/b.jsonl": b"",
        "full.jsonl/a.parquet": b"",
        "full.jsonl/a.csv": b"",
        "bare.jsonl/a.csv": b"",
        "latin.jsonl": b'{"prompt": "a"}\n{"prompt": "\xff"}\n',
        "broken.jsonl": b'{"prompt": "a"}\n\n{"prompt": }\n',
        "list.jsonl": b"[]\n",
        "saved/state.json": b"{}",
        "rows_of_here.py": b"""
VALUE = 3
def good(n=2):
    return [{"prompt": "a"}] * n
def bad():
    return [{"prompt": "a"}, "b"]
""",
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    monkeypatch.delitem(sys.modules, "rows_of_here", raising=False)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with pytest.raises(DataError) as e:
        load_table(DataSource(**source | {"path": source["path"].replace("HERE", str(tmp_path))}), seed=1)
    assert str(e.value) == told.replace("HERE", str(tmp_path))


@pytest.mark.parametrize(("rows", "terminal", "shown"), [(999, True, False), (1000, True, True), (1000, False, False)])
def test_a_bar_is_shown_of_many_rows_to_who_watches(
    rows: int, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    with progress("reading [mine]", rows) as advance:
        advance(rows // 2)
        advance(rows - rows // 2)
    assert ("reading [mine]" in screen.getvalue() and "100%" in screen.getvalue()) is shown


# Columns


def test_columns_are_renamed_and_nested_ones_pulled_out(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"question": "1+1", "metadata": {"answer": "2"}, "level": 3}])
    data = config(path, columns={"prompt": "question", "answer": "metadata.answer"})
    (prompt,) = load_prompts(data, tokenizer, seed=1).train
    assert prompt.text == "1+1"
    assert prompt.columns == {"answer": "2", "metadata": {"answer": "2"}, "level": 3}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "quest"}, r"line 1: no column 'quest', .* to 'prompt'; columns there: question, metadata"),
        ({"prompt": "metadata.ans"}, r"no column 'metadata\.ans', .* columns there: answer"),
        ({}, r"no column 'prompt' or 'messages'; columns there: question, metadata; .*columns: \{prompt: NAME\}"),
    ],
)
def test_a_missing_column_lists_those_that_exist(
    tokenizer: Any, jsonl: Callable[..., str], columns: dict[str, str], message: str
) -> None:
    path = jsonl([{"question": "1+1", "metadata": {"answer": "2"}}])
    with pytest.raises(DataError, match=message):
        load_prompts(config(path, columns=columns), tokenizer, seed=1)


# Prompts and templates


def test_token_ids_are_those_of_the_text(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    rows = [{"prompt": text} for text in ("1 + 1 =", " two  spaces ", "größer 数 🙂", "<think>\n")]
    for template in ("raw", "chat", "r1_zero", "r1"):
        for prompt in load_prompts(config(jsonl(rows), template=template), tokenizer, seed=1).train:
            assert tokenizer.decode(prompt.token_ids) == prompt.text
            assert all(type(i) is int for i in prompt.token_ids)


def test_templates_give_the_papers_text(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"prompt": "What is {1+1}?"}])

    def text(template: str, system: str | None = None) -> str:
        (prompt,) = load_prompts(config(path, template=template, system=system), tokenizer, seed=1).train
        return prompt.text

    assert text("raw") == "What is {1+1}?"
    assert text("chat") == "<bos><|user|>What is {1+1}?<|assistant|>"
    assert text("chat", system="Be brief.") == "<bos><|system|>Be brief.<|user|>What is {1+1}?<|assistant|>"
    assert text("r1") == f"<bos><|system|>{R1_SYSTEM}<|user|>What is {{1+1}}?<|assistant|>"
    assert text("r1_zero") == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the "
        "answer. The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is {1+1}?. Assistant:"
    )


@pytest.mark.parametrize("template", ["chat", "r1"])
def test_a_conversation_with_a_system_message_of_its_own_gets_no_second_one(
    template: str, tokenizer: Any, jsonl: Callable[..., str]
) -> None:
    user = {"role": "user", "content": "1+1"}
    rows = [{"prompt": [{"role": role, "content": "own"}, user]} for role in ("system", "developer")]
    given = None if template == "r1" else "ours"
    source = jsonl([*rows, {"prompt": [user]}, {"prompt": [user, {"role": "assistant", "content": "2"}, user]}])
    prompts = list(load_prompts(config(source, template=template, system=given), tokenizer, seed=1).train)
    roles = [[m["role"] for m in p.messages or []] for p in prompts]
    assert roles[:3] == [["system", "user"], ["developer", "user"], ["system", "user"]]
    assert roles[3] == ["system", "user", "assistant", "user"]
    assert [(p.messages or [])[0]["content"] for p in prompts] == ["own", "own", *[given or R1_SYSTEM] * 2]


def test_a_chat_template_gives_the_ids_that_transformers_gives(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+1"}]
    (prompt,) = load_prompts(
        config(jsonl([{"messages": messages, "answer": 2}]), template="chat"), tokenizer, seed=1
    ).train
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert prompt.token_ids == expected["input_ids"]
    assert prompt.messages == messages
    assert prompt.columns == {"answer": 2}


def test_a_jinja_file_sees_prompt_and_columns(tokenizer: Any, jsonl: Callable[..., str], tmp_path: Path) -> None:
    path = jsonl([{"prompt": "1+1", "unit": "m"}])
    file = tmp_path / "t.jinja"
    file.write_text("{{ bos_token }}{{ prompt }} in {{ columns.unit }}:\n")
    (prompt,) = load_prompts(config(path, template=str(file)), tokenizer, seed=1).train
    assert prompt.text == "<bos>1+1 in m:"
    assert prompt.token_ids[0] == tokenizer.bos_token_id
    file.write_text("{{ prompt }}{{ questoin }}")
    with pytest.raises(DataError, match=r"line 1: .*'questoin' is undefined; known names: prompt"):
        load_prompts(config(path, template=str(file)), tokenizer, seed=1)
    file.write_text("{{ prompt }}\n{% if %}")
    with pytest.raises(DataError, match=r"t\.jinja, line 2: not a valid Jinja template"):
        load_prompts(config(path, template=str(file)), tokenizer, seed=1)


def test_a_prompt_has_one_bos_whoever_puts_it_there(
    tiny_model: Path, jsonl: Callable[..., str], tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    adds_bos = AutoTokenizer.from_pretrained(tiny_model)
    bos = adds_bos.bos_token_id
    adds_bos.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    file = tmp_path / "t.jinja"
    file.write_text("{{ bos_token }}{{ prompt }}")
    path = jsonl([{"prompt": "1+1"}])
    for template in ("raw", "chat", "r1_zero", str(file)):
        (prompt,) = load_prompts(config(path, template=template), adds_bos, seed=1).train
        assert prompt.token_ids[0] == bos
        assert prompt.token_ids.count(bos) == 1, template


def test_templates_that_don_t_fit_are_refused_with_the_mend(
    tokenizer: Any, jsonl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = jsonl([{"prompt": [{"role": "user", "content": "1+1"}]}], "chat.jsonl")
    with pytest.raises(DataError, match=r"line 1: the prompt is a conversation.*data\.template=chat"):
        load_prompts(config(chat, template="raw"), tokenizer, seed=1)
    with pytest.raises(DataError, match=r"'chta' is neither a file nor one of chat, raw, r1, r1_zero"):
        load_prompts(config(chat, template="chta"), tokenizer, seed=1)
    with pytest.raises(DataError, match=r"no place for data\.system"):
        load_prompts(config(chat, template="raw", system="s"), tokenizer, seed=1)
    ends = jsonl(
        [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}], "ends.jsonl"
    )
    with pytest.raises(DataError, match="ends with an assistant's turn"):
        load_prompts(config(ends, template="chat"), tokenizer, seed=1)
    for messages in ([], [{"role": "user"}], ["hi"], 3):
        with pytest.raises(DataError, match=r"odd\.jsonl, line 1"):
            load_prompts(config(jsonl([{"prompt": messages}], "odd.jsonl"), template="chat"), tokenizer, seed=1)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match=r"has no chat template.*data\.template=raw"):
        load_prompts(config(chat, template="chat"), tokenizer, seed=1)


# What is left out


def test_long_prompts_are_dropped_and_counted_or_refused(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"prompt": "x" * n} for n in (3, 11, 10, 12)])
    kept = load_prompts(config(path, max_prompt_length=10), tokenizer, seed=1).train
    assert [p.id for p in kept] == ["sums/0/0", "sums/0/2"]
    assert (kept.report.num_rows, kept.report.num_too_long, kept.report.num_kept) == (4, 2, 2)
    with pytest.raises(DataError, match=r"sums\.jsonl, line 2: the prompt is 11 tokens, more than .* \(10\)"):
        load_prompts(config(path, max_prompt_length=10, long_prompts="error"), tokenizer, seed=1)
    with pytest.raises(DataError, match="none of its 4 rows is left: 4 are longer"):
        load_prompts(config(path, max_prompt_length=2), tokenizer, seed=1)
    assert len(load_prompts(config(path, max_prompt_length=10), tokenizer, seed=1, max_context=10).train) == 1


def test_prompts_of_the_evaluation_set_are_kept_out_of_training(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path, held_out = jsonl(sums(10)), jsonl([sums(10)[3], sums(10)[7], {"prompt": "new"}], "test.jsonl")
    data = config(path, eval=DataSource(path=held_out))
    sets = load_prompts(data, tokenizer, seed=1)
    assert [p.id for p in sets.eval[""]] == ["eval-test/0/0", "eval-test/0/1", "eval-test/0/2"]
    assert [p.id for p in sets.train] == [f"sums/0/{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]
    assert sets.train.report.num_in_eval == 2
    both = load_prompts(data.model_copy(update={"exclude_eval": False}), tokenizer, seed=1)
    assert len(both.train) == 10


def test_several_evaluation_sets_have_ids_of_their_own_and_are_all_kept_out(
    tokenizer: Any, jsonl: Callable[..., str]
) -> None:
    first, second = jsonl([sums(10)[3]], "a.jsonl"), jsonl([sums(10)[7]], "b.jsonl")
    data = config(jsonl(sums(10)), eval={"one": DataSource(path=first), "two": DataSource(path=second)})
    sets = load_prompts(data, tokenizer, seed=1)
    assert {name: [p.id for p in prompts] for name, prompts in sets.eval.items()} == {
        "one": ["eval-one/0/0"],
        "two": ["eval-two/0/0"],
    }
    assert [p.id for p in sets.train] == [f"sums/0/{i}" for i in (0, 1, 2, 4, 5, 6, 8, 9)]


def test_ids_are_stable_over_loads_and_epochs(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    data = config(jsonl(sums(6)))
    one = take(Cursor(load_prompts(data, tokenizer, seed=1).train, seed=9), 12)
    two = take(Cursor(load_prompts(data, tokenizer, seed=1).train, seed=9), 12)
    assert one == two
    assert sorted(p.id for p in one) == sorted(f"sums/{e}/{i}" for e in (0, 1) for i in range(6))
    for p in one:
        row = int(p.id.rsplit("/", 1)[1])
        assert (p.text, p.columns) == (f"{row}+{row}", {"answer": str(2 * row)})


# Demonstrations


def test_a_completion_decodes_back_exactly_and_ends_with_eos(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    texts = ["<think>8+6+0=14</think>\n<answer>84</answer>", " leading and trailing ", "größer 数 🙂", ""]
    rows: list[dict[str, Any]] = [{"prompt": "1+1", "completion": t} for t in texts]
    rows += [
        {"prompt": [{"role": "user", "content": "1+1"}], "completion": [{"role": "assistant", "content": t}]}
        for t in texts
    ]
    rows += [{"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": t}]} for t in texts]
    data = config(jsonl(rows), template="chat")
    examples = list(load_demonstrations(data, tokenizer, seed=1, max_length=200))
    assert len(examples) == 12
    for example, text in zip(examples, texts * 3, strict=True):
        assert example.completion_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(example.completion_ids[:-1]) == text
        assert tokenizer.decode(example.prompt_ids) == "<bos><|user|>1+1<|assistant|>"


def test_earlier_assistant_turns_belong_to_the_prompt(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    path = jsonl([{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (example,) = load_demonstrations(config(path, template="chat"), tokenizer, seed=1, max_length=200)
    assert tokenizer.decode(example.prompt_ids) == "<bos><|user|>a<|assistant|>b<eos><|user|>c<|assistant|>"
    assert tokenizer.decode(example.completion_ids) == "d<eos>"


def test_demonstrations_without_completion_or_too_long_are_named(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"prompt": "1+1", "completion": "x" * 5}, {"prompt": "1+1", "completion": "x" * 7}])
    kept = load_demonstrations(config(path), tokenizer, seed=1, max_length=10)
    assert ([e.id for e in kept], kept.report.num_too_long) == (["sums/0/0"], 1)
    with pytest.raises(DataError, match=r"line 2: prompt and completion are 11 tokens, more than max_length \(10\)"):
        load_demonstrations(config(path, long_prompts="error"), tokenizer, seed=1, max_length=10)
    with pytest.raises(
        DataError, match=r"line 1: no completion; expected a column 'completion'.*there: prompt, answer"
    ):
        load_demonstrations(config(jsonl(sums(1))), tokenizer, seed=1, max_length=10)


@pytest.mark.long
def test_a_hundred_thousand_rows_load_in_seconds(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(100_000)])
    with cpu_below(60):
        data = load_prompts(config(path), tokenizer, seed=1).train
        cursor = Cursor(data, seed=1)
        ids = {p.id for p in take(cursor, len(data))}
    assert len(ids) == 100_000


def test_token_lists_come_back_as_they_went_in() -> None:
    lists = TokenLists([np.arange(n, dtype=np.int32) for n in (3, 0, 5)])
    assert [lists[i] for i in range(3)] == [[0, 1, 2], [], [0, 1, 2, 3, 4]]


def test_a_part_of_a_generator_is_some_of_its_rows() -> None:
    source = DataSource(path="reasoning_gym:chain_sum", args={"size": 9, "seed": 5}, split="train[3:]", limit=2)
    table = load_table(source, seed=1)
    whole = load_table(source.model_copy(update={"split": "train", "limit": None}), seed=1)
    assert list(table.rows) == whole.rows[3:5]


@pytest.mark.parametrize(
    ("split", "limit", "kept"),
    [
        ("train[20%:50%]", None, [2, 3, 4]),
        ("train[20%:50%]", 2, [2, 3]),
        ("train[7:]", 5, [7, 8, 9]),
        ("train[:2]+train[8:]", None, [0, 1, 8, 9]),
    ],
)
def test_a_part_of_a_file_keeps_its_line_numbers(
    tmp_path: Path, split: str, limit: int | None, kept: list[int]
) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps(row) + "\n" for row in sums(10)))
    table = load_table(DataSource(path=str(path), split=split, limit=limit), seed=1)
    assert list(table.rows) == [sums(10)[i] for i in kept]
    assert [table.where(i) for i in range(len(kept))] == [f"{path}, line {2 * i + 1}" for i in kept]
    assert (table.name, table.label) == ("sums", str(path))


def test_a_part_without_rows_is_refused_with_what_there_is(jsonl: Callable[..., str]) -> None:
    path = jsonl(sums(4))
    with pytest.raises(
        DataError, match=re.escape(f"{path}: split 'train[4:]' holds none of its rows; it has: train with 4")
    ):
        load_table(DataSource(path=path, split="train[4:]"), seed=1)


def test_prompts_of_the_evaluation_set_are_kept_out_of_demonstrations(
    tokenizer: Any, jsonl: Callable[..., str]
) -> None:
    train = jsonl([row | {"completion": row["answer"]} for row in sums(6)], "train.jsonl")
    data = config(train).model_copy(update={"eval": DataSource(path=jsonl(sums(6)[2:4], "eval.jsonl"))})
    left = load_demonstrations(data, tokenizer, seed=1, max_length=64)
    ids = [left.item(i, 3).id for i in range(len(left))]
    assert ids == [f"train/3/{row}" for row in (0, 1, 4, 5)]
    assert (left.report.num_in_eval, left.report.num_kept) == (2, 4)
    seeds = []

    def read(source: DataSource, *, seed: int) -> Any:
        seeds.append((Path(source.path).name, seed))
        return load_table(source, seed=seed)

    load_demonstrations(data, tokenizer, seed=5, max_length=64, read=read)
    assert seeds == [("eval.jsonl", 5 + EVAL_SEED_OFFSET), ("train.jsonl", 5)]


def test_a_prompt_knows_what_was_asked_and_its_conversation(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    turns = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "So?"},
    ]
    (text,) = load_prompts(config(jsonl(sums(1)), system="Be short.", template="chat"), tokenizer, seed=1).train
    chat = load_prompts(config(jsonl([{"prompt": turns}]), template="chat"), tokenizer, seed=1).train
    assert text.asked == "0+0"
    assert chat.item(0, 0).asked == turns
    assert chat.conversation(0) == turns
    train = load_prompts(config(jsonl(sums(2)), system="Be short.", template="chat"), tokenizer, seed=1).train
    assert train.conversation(1) == [{"role": "user", "content": "1+1"}]


def test_demonstrations_have_another_fingerprint_where_anything_differs(
    tokenizer: Any, jsonl: Callable[..., str]
) -> None:
    def of(row: dict[str, str], name: str = "a.jsonl") -> str:
        path = jsonl([{"prompt": "1", "completion": "2"}, row], name)
        return load_demonstrations(config(path), tokenizer, seed=1, max_length=10).fingerprint

    first = of({"prompt": "1+1", "completion": "2"})
    assert first == of({"prompt": "1+1", "completion": "2"})
    others = [
        of({"prompt": "1+1", "completion": "3"}),
        of({"prompt": "1+2", "completion": "2"}),
        of({"prompt": "1+1", "completion": "2"}, "b.jsonl"),
        of({"prompt": "1+12", "completion": "2"}),
    ]
    assert len({first, *others}) == 5


def test_a_system_message_is_in_demonstrations_and_in_what_was_trained_on(
    tokenizer: Any, jsonl: Callable[..., str]
) -> None:
    train = jsonl([row | {"completion": row["answer"]} for row in sums(4)], "train.jsonl")
    data = config(train, template="chat", system="Be short.").model_copy(
        update={"eval": DataSource(path=jsonl(sums(6)[2:], "eval.jsonl")), "exclude_eval": False}
    )
    (first, *_) = load_demonstrations(data, tokenizer, seed=1, max_length=100)
    assert "Be short." in tokenizer.decode(first.prompt_ids)
    evaluation = load_prompts(data, tokenizer, seed=1).eval
    assert trained_on(data, tokenizer, evaluation, seed=1) == 2
    other = data.model_copy(update={"system": "Be long."})
    assert trained_on(other, tokenizer, evaluation, seed=1) == 0


def test_a_demonstration_may_be_as_long_as_the_limit(tokenizer: Any, jsonl: Callable[..., str]) -> None:
    path = jsonl([{"prompt": "1+1", "completion": "x" * 6}])
    assert len(load_demonstrations(config(path), tokenizer, seed=1, max_length=10)) == 1
    with pytest.raises(
        DataError, match=r"none of its 1 rows is left: 1 are longer than max_length \(9 tokens\), 0 are"
    ):
        load_demonstrations(config(path), tokenizer, seed=1, max_length=9)


def test_a_prompt_may_be_as_long_as_the_limit_or_as_the_context_leaves(
    tokenizer: Any, jsonl: Callable[..., str]
) -> None:
    data = config(jsonl([{"prompt": "12345"}]), max_prompt_length=5)
    assert len(load_prompts(data, tokenizer, seed=1, max_context=6).train) == 1
    with pytest.raises(DataError, match=r"longer than what the model's context leaves \(4 tokens\)"):
        load_prompts(data, tokenizer, seed=1, max_context=5)
    shorter = data.model_copy(update={"max_prompt_length": 4})
    with pytest.raises(DataError, match=r"1 are longer than data\.max_prompt_length \(4 tokens\)"):
        load_prompts(shorter, tokenizer, seed=1, max_context=6)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_row_of_parquet_that_python_cannot_hold_is_named_by_its_number(tmp_path: Path, size: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "times.parquet"
    for broken in range(size):
        times = pa.array([2**60 if i == broken else i for i in range(size)], pa.timestamp("us"))
        pq.write_table(pa.table({"at": times}), path)
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}, row {broken}: \w+Error: \w"):
            load_table(DataSource(path=str(path)), seed=1)


def test_a_subset_of_a_folder_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    subsets = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("easy", "hard")]
    for name in ("easy", "hard"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(3)))
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(subsets)}\n---\n")
    table = load_table(DataSource(path=str(folder), name="hard", limit=2), seed=1)
    assert (table.name, table.label) == ("folder-hard-train", str(folder))
    assert list(table.rows) == [{"prompt": "hard 0"}, {"prompt": "hard 1"}]


def test_a_saved_data_set_has_parts_and_a_part_without_rows_is_refused_with_what_there_is(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"prompt": f"p{i}"} for i in range(5)])
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(str(tmp_path / "splits"))

    def prompts(path: str, split: str) -> list[str]:
        return [row["prompt"] for row in load_table(DataSource(path=str(tmp_path / path), split=split), seed=1).rows]

    assert prompts("saved", "train") == ["p0", "p1", "p2", "p3", "p4"]
    assert prompts("saved", "train[3:]") == ["p3", "p4"]
    assert prompts("splits", "test+train[:2]") == ["p4", "p0", "p1"]
    with pytest.raises(DataError, match=r"holds none of its rows; it has: train with 5, test with 1$"):
        prompts("splits", "train[5:]")
    with pytest.raises(DataError, match=r"has no split 'test'; it has: train, and a part"):
        prompts("saved", "test")
