"""A tiny model's tokenizer without Transformers is the one that Transformers reads."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model, tiny_shape
from grpo_ray.models.files.tiny_tokenizer import TinyTokenizer

OPTIONS: list[dict[str, Any]] = [{}, {"words": ("one", "two", "<think>", "a b"), "vocab_size": 512, "num_layers": 1}]
TEXTS = [
    "1 + 2 =",
    "  It's 7\u00a0km,\n\n naïve \u0065\u0301 \ufb01 \u212b",
    "<think>so</think><answer>one two a b</answer><eos> <|user|> <pad>",
    "你好 🙂\x00\u200d",
    "",
]
CONVERSATIONS = [
    [{"role": "user", "content": "a {{ b }} {% c %}"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "\n x "}],
    [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "<think>\n1</think> "},
        {"role": "tool", "content": "é"},
    ],
]


@pytest.fixture(scope="module", params=OPTIONS, ids=["plain", "words"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyTokenizer, Any, Path]:
    config = TinyModelConfig(**{"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, **request.param})
    folder = build_tiny_model(tmp_path_factory.mktemp("tiny"), config)
    read = AutoConfig.from_pretrained(folder)
    assert {name: getattr(read, name) for name in tiny_shape(config)} == tiny_shape(config)
    return TinyTokenizer(config), AutoTokenizer.from_pretrained(folder), folder


def test_it_has_the_same_vocabulary_rules_and_special_tokens(both: tuple[TinyTokenizer, Any, Path]) -> None:
    ours, theirs, folder = both
    assert json.loads(ours.backend.to_str()) == json.loads((folder / "tokenizer.json").read_text())
    assert json.loads(ours.backend.to_str()) == json.loads(theirs.backend_tokenizer.to_str())
    assert len(ours) == len(theirs)
    assert {i: (t.content, t.special) for i, t in ours.added_tokens_decoder.items()} == {
        i: (t.content, t.special) for i, t in theirs.added_tokens_decoder.items()
    }
    for name in ("pad", "eos", "bos", "unk"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    assert [ours.convert_ids_to_tokens(i) for i in range(len(ours))] == theirs.convert_ids_to_tokens(range(len(ours)))


@pytest.mark.parametrize("special", [False, True])
def test_it_gives_the_same_tokens(both: tuple[TinyTokenizer, Any, Path], special: bool) -> None:
    ours, theirs, _ = both
    told = [t(TEXTS, add_special_tokens=special, verbose=False)["input_ids"] for t in (ours, theirs)]
    assert told[0] == told[1]
    assert [ours(text, add_special_tokens=special)["input_ids"] for text in TEXTS] == told[0]
    assert ours.decode(told[0][1]) == theirs.decode(told[0][1])


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_it_writes_the_same_chats(
    both: tuple[TinyTokenizer, Any, Path], messages: list[dict[str, Any]], ask: bool, options: dict[str, Any]
) -> None:
    texts = [
        tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False, **options)
        for tokenizer in both[:2]
    ]
    assert texts[0] == texts[1]


def test_its_chat_template_takes_the_same_arguments(both: tuple[TinyTokenizer, Any, Path]) -> None:
    ours, theirs, _ = both
    assert inspect.signature(ours.apply_chat_template) == inspect.signature(theirs.apply_chat_template)
    assert ours.chat_template == theirs.chat_template
