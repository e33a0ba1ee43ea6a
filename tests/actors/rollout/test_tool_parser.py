"""Calls of tools read by vLLM's parsers."""

from __future__ import annotations

from typing import Any

import pytest

from actors.rollout.tool_parser import reader
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.episodes.calls import ToolCall
from grpo_ray.errors import ConfigError
from grpo_ray.models.files.tiny import make_tokenizer

SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {"name": "search", "description": "", "parameters": {"type": "object", "properties": {}}},
}


def test_another_parser_of_vllm_reads_calls_and_what_is_none() -> None:
    read = reader("pythonic", make_tokenizer(TinyModelConfig()), [SCHEMA])
    assert read("[search(query='x', n=2)]").calls == (ToolCall("search", {"query": "x", "n": 2}),)
    assert read("no call") == read("no call").__class__("no call")


def test_a_text_at_which_a_parser_fails_ends_the_episode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.tool_parsers import ToolParserManager

    def fails(*_: Any) -> None:
        raise IndexError("no such group")

    monkeypatch.setattr(ToolParserManager.get_tool_parser("pythonic"), "extract_tool_calls", fails)
    turn = reader("pythonic", make_tokenizer(TinyModelConfig()), [SCHEMA])("[search(")
    assert (turn.content, turn.calls, turn.broken) == ("[search(", (), True)


def test_a_parser_that_vllm_lacks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"environment\.tool_parser 'none_such'.*hermes"):
        reader("none_such", make_tokenizer(TinyModelConfig()), [SCHEMA])
