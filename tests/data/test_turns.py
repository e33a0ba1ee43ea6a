"""How prompts and answers are written down, family by family: against TRL's own preparation of data for SFT, where that trains what
can be sampled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from trl import SFTConfig, SFTTrainer

from grpo_ray.config.data import DataConfig
from grpo_ray.data.preferences import load_pairs
from grpo_ray.data.prompts import load_demonstrations, load_prompts
from grpo_ray.data.templates import make_template
from grpo_ray.data.turns import TurnEnd, end_of_text
from grpo_ray.errors import DataError
from tests.families import FAMILIES, family_tokenizer

THOUGHT = "<think>\nhm\n</think>\n\nso"
Write = Callable[..., DataConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def rows(*rows: dict[str, Any], **other: Any) -> DataConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataConfig.model_validate({"train": {"path": str(path)}, "template": "chat", **other})

    return rows


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def ours(data: DataConfig, tokenizer: Any) -> list[tuple[str, str]]:
    """(prompt, completion), decoded."""
    return [
        (tokenizer.decode(e.prompt_ids), tokenizer.decode(e.completion_ids))
        for e in load_demonstrations(data, tokenizer, seed=1, max_length=400)
    ]


def trls(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """What TRL's SFTTrainer would train on: (prompt ids, completion ids)."""
    trainer: Any = object.__new__(SFTTrainer)
    vars(trainer).update(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    args = SFTConfig(
        output_dir="unused", max_length=None, use_cpu=True, bf16=False, report_to=[], shuffle_dataset=False
    )
    (made,) = trainer._prepare_dataset(datasets.Dataset.from_list([row]), tokenizer, args, False, None, "train")
    num_prompt = sum(label == -100 for label in made["labels"])
    return made["input_ids"][:num_prompt], made["input_ids"][num_prompt:]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_ends_as_the_template_ends_a_turn(name: str, write: Write) -> None:
    tokenizer, family = family_tokenizer(name), FAMILIES[name]
    end = make_template("chat", tokenizer).end
    assert (end.token, end.id) == (family.end, tokenizer.convert_tokens_to_ids(family.end))
    data = write({"prompt": "q", "completion": THOUGHT}, {"prompt": ask("q"), "completion": say(THOUGHT)})
    for example in load_demonstrations(data, tokenizer, seed=1, max_length=400):
        assert example.completion_ids[-1] == end.id
        assert example.completion_ids.count(end.id) == 1
        assert tokenizer.decode(example.completion_ids).removesuffix(family.end).rstrip().endswith("so")
    pairs = write({"prompt": "q", "chosen": THOUGHT, "rejected": "<think>\n</think>no"})
    (pair,) = load_pairs(pairs, tokenizer, seed=1, max_length=400).train
    assert [ids[-1] for ids in pair.answers] == [end.id, end.id]


@pytest.mark.parametrize("text", ["b", "two words ", THOUGHT])
@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in ("r1 distill", "no end")])
def test_a_demonstration_is_trained_as_in_trl_up_to_the_end_of_its_turn(name: str, text: str, write: Write) -> None:
    tokenizer = family_tokenizer(name)
    row = {"prompt": ask("q"), "completion": say(text)}
    prompt, completion = trls(row, tokenizer)
    end = make_template("chat", tokenizer).end
    (example,) = load_demonstrations(write(row), tokenizer, seed=1, max_length=400)
    assert example.prompt_ids == prompt
    assert example.completion_ids == completion[: completion.index(end.id) + 1]


@pytest.mark.parametrize("completion", ["b", " b", "b<|endoftext|>"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_raw_text_is_trained_as_in_trl(adds_bos: bool, completion: str, write: Write) -> None:
    tokenizer = family_tokenizer("gemma" if adds_bos else "qwen base", adds_bos=adds_bos)
    row = {"prompt": "1+1=", "completion": completion.replace("<|endoftext|>", tokenizer.eos_token)}
    (example,) = load_demonstrations(write(row, template="raw"), tokenizer, seed=1, max_length=400)
    assert (example.prompt_ids, example.completion_ids) == trls(row, tokenizer)


@pytest.mark.parametrize("name", ["qwen base", "gemma", "phi3", "llama3", "llama2"])
def test_an_answer_that_brings_its_end_does_not_get_two(name: str, write: Write) -> None:
    tokenizer, family = family_tokenizer(name), FAMILIES[name]
    ends = (family.end, family.eos, f"{family.end}\n", f"{family.end}{family.eos}", f"{family.end}\n{family.end}\n")
    rows = [{"prompt": "q", "completion": f"b{end}"} for end in ("", *ends)]
    assert len(set(ours(write(*rows), tokenizer))) == 1
    assert len({c for _, c in ours(write(*rows[:2], template="raw"), tokenizer)}) == (
        1 if family.end == family.eos else 2
    )
    (_, raw), _ = ours(write({"prompt": "q", "completion": f"b{family.eos}\n"}, rows[0], template="raw"), tokenizer)
    assert raw == f"b{family.eos}"
    with pytest.raises(DataError, match=r"line 1: chosen and rejected are the same text"):
        load_pairs(
            write({"prompt": "q", "chosen": "b", "rejected": f"b{family.end}"}), tokenizer, seed=1, max_length=400
        )


@pytest.mark.parametrize("template", ["raw", "r1_zero"])
def test_a_prompt_goes_on_whatever_the_tokenizer_puts_behind_texts(template: str, write: Write) -> None:
    around, before = family_tokenizer("gemma", adds_bos=True, adds_eos=True), family_tokenizer("gemma", adds_bos=True)
    data = write({"prompt": "1+1"}, {"prompt": "<bos>1+1"}, template=template)
    for mine, plain in zip(*(load_prompts(data, t, seed=1).train for t in (around, before)), strict=True):
        assert mine.token_ids == plain.token_ids
        assert mine.token_ids[-1] != around.eos_token_id
        assert mine.token_ids[0] == around.bos_token_id
    first, second = load_prompts(write({"prompt": "1+1"}, {"prompt": "<bos>1+1"}, template="raw"), around, seed=1).train
    assert first.token_ids == second.token_ids
    (example,) = load_demonstrations(
        write({"prompt": "1", "completion": "2"}, template="raw"), around, seed=1, max_length=9
    )
    assert around.decode(example.prompt_ids + example.completion_ids) == "<bos>12<eos>"


def test_a_tokenizer_that_begins_texts_with_a_space_puts_none_between_prompt_and_answer(write: Write) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("\u2581ab?")}, merges=[]))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    row = {"prompt": "a?", "completion": "b"}
    (example,) = load_demonstrations(write(row, template="raw"), tokenizer, seed=1, max_length=9)
    assert tokenizer.decode(example.prompt_ids + example.completion_ids) == "a?b</s>"
    assert (example.prompt_ids, example.completion_ids) == trls(row, tokenizer)


# Thinking that the template opens


@pytest.mark.parametrize("name", ["r1 distill", "qwen3.5"])
@pytest.mark.parametrize("text", [THOUGHT, "hm\n</think>\n\nso", "\n" + THOUGHT])
def test_a_demonstration_does_not_open_the_thinking_again(name: str, text: str, write: Write) -> None:
    tokenizer = family_tokenizer(name)
    ((prompt, completion),) = ours(write({"prompt": "q", "completion": text}), tokenizer)
    assert prompt.endswith("<think>\n")
    assert completion == f"hm\n</think>\n\nso{FAMILIES[name].end}"


def test_an_answer_without_thinking_closes_it_where_the_template_says_how_and_is_refused_elsewhere(
    write: Write,
) -> None:
    data = write({"prompt": "q", "completion": THOUGHT}, {"prompt": "q", "completion": "so"})
    assert ours(data, family_tokenizer("qwen3.5"))[1][1] == "\n</think>\n\nso<|im_end|>"
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 2: .* opens <think> in the prompt, and this answer does not close"
    ):
        ours(data, family_tokenizer("r1 distill"))


@pytest.mark.parametrize("template", ["raw", "a file"])
def test_thinking_opened_by_any_template_is_not_opened_again(template: str, write: Write, tmp_path: Path) -> None:
    if template == "a file":
        (tmp_path / "t.jinja").write_text("{{ prompt }}<think>\n")
        template, prompt = str(tmp_path / "t.jinja"), "q"
    else:
        prompt = "q<think>\n"
    data = write({"prompt": prompt, "completion": THOUGHT}, template=template)
    ((asked, answered),) = ours(data, family_tokenizer("qwen base"))
    assert asked.rstrip() == "q<think>"
    assert asked + answered == "q<think>\nhm\n</think>\n\nso<|endoftext|>"


# Templates that tell nothing


def test_a_turn_that_ends_in_text_gets_the_end_of_sequence_behind_it_and_not_twice(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = family_tokenizer("qwen base")
    turns = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n### End\n{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", turns + "{% if add_generation_prompt %}### assistant: {% endif %}")
    data = write({"prompt": "q", "completion": "b"}, {"prompt": "q", "completion": "b\n### End\n"})
    assert [c for _, c in ours(data, tokenizer)] == ["b\n### End<|endoftext|>", "b\n\n### End<|endoftext|>"]


def test_a_template_that_writes_the_prompt_otherwise_before_an_answer_is_refused_with_the_row(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = family_tokenizer("qwen")
    template = tokenizer.chat_template.replace("<|im_start|>assistant\n", "<|im_start|>assistant (think hard)\n")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: .*in another way when an answer follows"):
        ours(write({"prompt": "q", "completion": "b"}), tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(DataError, match="does not write an assistant's text down once"):
        ours(write({"prompt": "q", "completion": "b"}), tokenizer)
    assert [p.text for p in load_prompts(write({"prompt": "q"}), tokenizer, seed=1).train] == ["Q"]


def test_a_template_that_knows_two_roles_alone_tells_how_its_turns_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = family_tokenizer("qwen")
    turns = "{% if m.role == 'user' %}{{ m.content }}\n{% elif m.role == 'assistant' %}{{ m.content }} <|im_end|>\n"
    other = "{% else %}{{ raise_exception('no such role') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", f"{{% for m in messages %}}{turns}{other}{{% endfor %}}")
    end = make_template("chat", tokenizer).end
    assert (end.token, end.before, end.tail) == ("<|im_end|>", " ", " <|im_end|>\n")
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}\nEND \n{% endfor %}")
    end = make_template("chat", tokenizer).end
    assert (end.token, end.before, end.tail, end.also) == (tokenizer.eos_token, "\nEND", "\nEND \n", ("END",))


def test_a_tokenizer_that_can_end_no_answer_is_refused_with_the_mend() -> None:
    with pytest.raises(DataError, match=r"^the tokenizer has no end-of-sequence token, .*; set its eos_token$"):
        end_of_text(SimpleNamespace(eos_token_id=None))
    assert end_of_text(SimpleNamespace(eos_token_id="3", eos_token="</s>")) == TurnEnd(3, "</s>")


# What a chat template is shown besides


def texts(data: DataConfig, name: str = "qwen3.5") -> list[str]:
    return [p.text for p in load_prompts(data, family_tokenizer(name), seed=1).train]


def test_a_row_s_variables_and_tools_reach_the_chat_template(write: Write) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    asks, opens = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "<think>\n"
    rows: list[dict[str, Any]] = [
        {"prompt": "q"},
        {"prompt": "q", "chat_template_kwargs": {"enable_thinking": False}},
        {"prompt": "q", "chat_template_kwargs": {"enable_thinking": None}, "tools": []},
        {"prompt": "q", "tools": tools, "chat_template_kwargs": json.dumps({"enable_thinking": True})},
        {"prompt": "q", "tools": json.dumps(tools)},
    ]
    shown = f"<|im_start|>system\n{json.dumps(tools[0])}<|im_end|>\n{asks}{opens}"
    closed = f"{asks}<think>\n\n</think>\n\n"
    assert texts(write(*rows)) == [asks + opens, closed, asks + opens, shown, shown]
    quiet = write(*rows, chat_template_kwargs={"enable_thinking": False})
    assert texts(quiet) == [closed, closed, closed, shown, shown.removesuffix(opens) + "<think>\n\n</think>\n\n"]
    demonstrations = write(*({**row, "completion": "so"} for row in rows[:4]))
    assert [c for _, c in ours(demonstrations, family_tokenizer("qwen3.5"))] == [
        "\n</think>\n\nso<|im_end|>",
        "so<|im_end|>",
        "\n</think>\n\nso<|im_end|>",
        "\n</think>\n\nso<|im_end|>",
    ]
    off = write({"prompt": "q", "completion": "so"}, chat_template_kwargs={"enable_thinking": False})
    assert [c for _, c in ours(off, family_tokenizer("qwen3.5"))] == ["so<|im_end|>"]
    pairs = write({**rows[1], "chosen": "so", "rejected": "no"})
    (pair,) = load_pairs(pairs, family_tokenizer("qwen3.5"), seed=1, max_length=400).train
    assert family_tokenizer("qwen3.5").decode(pair.prompt_ids) == closed


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"chat_template_kwargs": [1]}, r"expected column 'chat_template_kwargs' to be a mapping .* got list"),
        ({"chat_template_kwargs": "no"}, r"to be a mapping .* got str 'no'"),
        ({"chat_template_kwargs": {"tokenize": True}}, r"holds 'tokenize', which is no variable of a chat template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, r"holds 'chat_template', which is no variable"),
        ({"chat_template_kwargs": {"messages": []}}, r"holds 'messages', which is no variable"),
        ({"tools": {"name": "add"}}, r"expected column 'tools' to be a list of JSON schemas, got dict"),
        ({"tools": ["add"]}, r"expected column 'tools' to be a list of JSON schemas, got list"),
    ],
)
def test_variables_and_tools_of_the_wrong_kind_are_named_with_their_row(
    columns: dict[str, Any], words: str, write: Write
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{words}"):
        texts(write({"prompt": "q"}, {"prompt": "q", **columns}))


def test_blank_text_is_no_variable_and_no_tool(write: Write) -> None:
    blank = write({"prompt": "q"}, {"prompt": "q", "chat_template_kwargs": " ", "tools": ""})
    assert len(set(texts(blank))) == 1


def test_variables_of_a_template_that_has_none_are_refused(write: Write) -> None:
    for template in ("raw", "r1_zero", "x.jinja"):
        with pytest.raises(DataError, match=r"has no place for data\.chat_template_kwargs"):
            texts(write({"prompt": "q"}, template=template, chat_template_kwargs={"enable_thinking": False}))


def test_a_system_message_is_put_before_prompts_that_have_none(write: Write) -> None:
    own = [{"role": "system", "content": "mine"}, *ask("q")]
    data = write({"prompt": "q"}, {"prompt": ask("q")}, {"prompt": own}, system="be brief")
    head, rest = "<|im_start|>system\n{}<|im_end|>\n", "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert texts(data, "qwen") == [head.format(s) + rest for s in ("be brief", "be brief", "mine")]


def test_a_reward_model_reads_an_answer_as_it_was_trained_to(write: Write) -> None:
    from grpo_ray.rewards.reward_model import _Scorer

    for name in ("gemma", "qwen3.5", "r1 distill"):
        tokenizer = family_tokenizer(name)
        (pair,) = load_pairs(
            write({"prompt": ask("q"), "chosen": THOUGHT, "rejected": "<think></think>no"}),
            tokenizer,
            seed=1,
            max_length=400,
        ).train
        scorer: Any = object.__new__(_Scorer)
        scorer._tokenizer, scorer._templates = tokenizer, {}
        np.testing.assert_array_equal(scorer._ids(ask("q"), THOUGHT), [*pair.prompt_ids, *pair.answers[0]])
        assert scorer._ids(ask("q"), "<think>cut")[-1] == pair.answers[0][-1]
