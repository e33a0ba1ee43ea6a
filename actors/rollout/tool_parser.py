"""Tool calls read by one of vLLM's parsers, where a model does not write them as Hermes does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grpo_ray.episodes.calls import HERMES, ReadCalls, Turn, call_of, read_hermes
from grpo_ray.errors import ConfigError


def reader(name: str | None, tokenizer: Any, schemas: Sequence[dict[str, Any]]) -> ReadCalls:
    """The function that reads calls as `environment.tool_parser` says.

    Raises:
        ConfigError: vLLM has no parser of this name, or it can't read with this tokenizer.
    """
    if name is None or name == HERMES:
        return read_hermes
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    asked = ChatCompletionRequest.model_validate(
        {"model": "", "messages": [{"role": "user", "content": ""}], "tools": list(schemas), "tool_choice": "auto"}
    )
    try:
        parser = ToolParserManager.get_tool_parser(name)(tokenizer, asked.tools)
    except Exception as e:
        raise ConfigError(
            f"environment.tool_parser {name!r} can't be used with this model ({e}); name the one of vLLM's tool parsers that is "
            "made for it, or hermes"
        ) from None
    mark = getattr(parser, "tool_call_start_token", None)

    def read(text: str) -> Turn:
        try:
            found = parser.extract_tool_calls(text, asked)
            calls = tuple(call_of(call.function.name, call.function.arguments) for call in found.tool_calls)
        # Most catch what the model's text makes them raise; of the others it may be anything.
        except Exception:
            return Turn(text, broken=True)
        if not found.tools_called:
            return Turn(text, broken=isinstance(mark, str) and bool(mark) and mark in text)
        return Turn(found.content or "", calls)

    return read
