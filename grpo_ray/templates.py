"""From a row to the text that the model continues.

| template  | text                                                       | special tokens added to it             |
|-----------|------------------------------------------------------------|----------------------------------------|
| `chat`    | the tokenizer's own chat template, generation prompt added | none: the template has its own         |
| `r1`      | `chat`, with `R1_SYSTEM` as system message                 | none                                   |
| `raw`     | the prompt as it is                                        | those the tokenizer puts around a text |
| `r1_zero` | `R1_ZERO`, for base models                                 | the same                               |
| a file    | Jinja, see below                                           | the same, unless it starts with bos    |

A Jinja file sees `prompt` (text or messages), `messages` (or none), `system`, `columns`, `bos_token` and `eos_token`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grpo_ray.errors import DataError

R1_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
"""The instruction of DeepSeek-R1-Zero's template (2501.12948, Table 1)."""

R1_ZERO = R1_SYSTEM + " User: {prompt}. Assistant:"
"""DeepSeek-R1-Zero's template (2501.12948, Table 1), whole. The full stop after the prompt is the paper's."""

BUILT_IN = ("chat", "raw", "r1", "r1_zero")


@dataclass(frozen=True)
class Rendered:
    """One row, templated."""

    text: str
    messages: list[dict[str, Any]] | None
    """The conversation, system message included; None for a string prompt outside a chat template."""
    add_special_tokens: bool
    """Does the tokenizer still have to put its own (bos) around `text`?"""


Render = Callable[[Any, dict[str, Any]], Rendered]
"""(prompt: str or list of messages, other columns) -> Rendered."""


def make_template(name: str, tokenizer: Any, system: str | None = None) -> Render:
    """The function that templates one row.

    Raises:
        DataError: a template that doesn't exist or doesn't parse, a tokenizer without chat template, `system` with a
            template that has no place for it. The returned function raises it for a row that doesn't fit the template.
    """
    match name:
        case "chat" | "r1":
            if not getattr(tokenizer, "chat_template", None):
                raise DataError(
                    f"data.template is {name!r}, but the tokenizer of {_name(tokenizer)} has no chat template "
                    "(base models often have none); set data.template=raw, r1_zero, or the path of a Jinja file"
                )
            if name == "r1" and system is not None:
                raise DataError(
                    "data.template r1 brings its own system message; drop data.system, or set data.template=chat"
                )
            return _chat(tokenizer, R1_SYSTEM if name == "r1" else system)
        case "raw" | "r1_zero":
            if system is not None:
                raise DataError(
                    f"data.template {name} has no place for data.system; drop it, or set data.template=chat"
                )
            return _text("{prompt}" if name == "raw" else R1_ZERO, name)
        case _:
            return _jinja(Path(name), tokenizer, system)


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the model"


def _chat(tokenizer: Any, system: str | None) -> Render:
    def render(prompt: Any, _columns: dict[str, Any]) -> Rendered:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except jinja2.TemplateError as e:
            raise DataError(f"the tokenizer's chat template refuses the conversation: {e}") from None
        return Rendered(text, messages, add_special_tokens=False)

    return render


def _text(template: str, name: str) -> Render:
    def render(prompt: Any, _columns: dict[str, Any]) -> Rendered:
        if not isinstance(prompt, str):
            raise DataError(
                f"the prompt is a conversation, and data.template {name} takes a string; set data.template=chat, "
                "or map a column that holds the text: data.train.columns={prompt: NAME}"
            )
        return Rendered(template.replace("{prompt}", prompt), None, add_special_tokens=True)

    return render


def _jinja(path: Path, tokenizer: Any, system: str | None) -> Render:
    if not path.is_file():
        raise DataError(f"data.template {str(path)!r} is neither a file nor one of {', '.join(BUILT_IN)}")
    # Sandboxed as Transformers' own chat templates are: a template is often downloaded with the data.
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=False, trim_blocks=True, lstrip_blocks=True
    )
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
    except jinja2.TemplateSyntaxError as e:
        raise DataError(f"{path}, line {e.lineno}: not a valid Jinja template: {e.message}") from None
    bos = getattr(tokenizer, "bos_token", None) or ""
    eos = getattr(tokenizer, "eos_token", None) or ""

    def render(prompt: Any, columns: dict[str, Any]) -> Rendered:
        messages: list[dict[str, Any]] | None = None if isinstance(prompt, str) else list(prompt)
        values = {"prompt": prompt, "messages": messages, "system": system, "columns": columns}
        try:
            text = template.render(**values, bos_token=bos, eos_token=eos)
        except jinja2.TemplateError as e:
            raise DataError(f"{path}: {e}; known names: {', '.join(values)}, bos_token, eos_token") from None
        return Rendered(text, messages, add_special_tokens=not (bos and text.startswith(bos)))

    return render
