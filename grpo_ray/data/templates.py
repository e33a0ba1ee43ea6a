"""Templates: from a row to the text that the model continues.

| template  | text                                                       | special tokens added to it             |
|-----------|------------------------------------------------------------|----------------------------------------|
| `chat`    | the tokenizer's own chat template, generation prompt added | none: the template has its own         |
| `chat:X`  | its chat template that is called X                         | none                                   |
| `r1`      | `chat`, with `R1_SYSTEM` as system message                 | none                                   |
| `raw`     | the prompt as it is                                        | those the tokenizer puts around a text |
| `r1_zero` | `R1_ZERO`, for base models                                 | the same                               |
| a file    | Jinja, see below                                           | the same                               |

No text gets a second bos. A Jinja file sees `prompt` (text or messages), `messages` (or none), `system`, `columns`, `bos_token` and
`eos_token`. A chat template sees a row's columns `tools` and `chat_template_kwargs`, as in TRL.

A demonstration is what follows the prompt in the template's text of the whole conversation, up to the token that ends the turn.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grpo_ray import json_text
from grpo_ray.data.thinking import CLOSE, OPEN, opens_thinking, without_opening
from grpo_ray.data.turns import TurnEnd, end_of_text, end_of_turn
from grpo_ray.errors import DataError, told
from grpo_ray.time_limit import TooLongError, within_thread_s

R1_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, "
    "i.e., <think> reasoning process here </think> <answer> answer here </answer>."
)
"""The instruction of DeepSeek-R1-Zero's template (2501.12948, Table 1)."""

R1_ZERO = R1_SYSTEM + " User: {prompt}. Assistant:"
"""The whole of DeepSeek-R1-Zero's template (2501.12948, Table 1). The full stop after the prompt is the paper's."""

CHAT = ("chat", "r1")
BUILT_IN = ("chat", "raw", "r1", "r1_zero")
RENDER_S = 2.0
"""The limit on processor time for one row; a template takes milliseconds."""
_ENDLESS = f"takes more than {RENDER_S:g} s of processor time for one prompt, so it may never end; set data.template to another"
KWARGS, TOOLS = "chat_template_kwargs", "tools"


@dataclass(frozen=True)
class Rendered:
    """One row, templated."""

    text: str
    messages: list[dict[str, Any]] | None
    """The conversation, system message included; None for a string prompt outside a chat template."""
    add_special_tokens: bool
    """Whether the tokenizer still has to add its own special tokens (bos) around `text`."""
    options: Mapping[str, Any] | None = None
    """The further arguments of the chat template: `tools`, and its keyword arguments."""


Render = Callable[[Any, dict[str, Any]], Rendered]
"""(prompt: str or list of messages, other columns) -> Rendered."""


class Template:
    """A template with its tokenizer. Called with (prompt: str or list of messages, other columns) it templates one row."""

    def __init__(self, render: Render, tokenizer: Any) -> None:
        self._render = render
        self._tokenizer = tokenizer

    def __call__(self, prompt: Any, columns: dict[str, Any]) -> Rendered:
        """The templated row. Raises DataError for a row that does not fit the template."""
        return self._render(prompt, columns)

    @cached_property
    def end(self) -> TurnEnd:
        """The end of an answer.

        Raises:
            DataError: it can't be determined.
        """
        return end_of_text(self._tokenizer)

    def answer(self, prompt: Rendered, text: str, *, sampled: bool = False) -> str:
        """The text that an answer adds after the prompt, without the token that ends it.

        Args:
            sampled: whether a model wrote it, which may stop anywhere; it is used as it is if it does not fit the template.

        Raises:
            DataError: the template has no place for it.
        """
        return self._as_written(prompt, text)

    def _as_written(self, prompt: Rendered, text: str) -> str:
        return without_opening(prompt.text, self.end.stripped(text)) + self.end.before


class ChatTemplate(Template):
    """The tokenizer's own chat template, or the one of several that `chosen` names."""

    def __init__(self, render: Render, tokenizer: Any, chosen: Mapping[str, Any]) -> None:
        super().__init__(render, tokenizer)
        self._chosen = chosen

    @cached_property
    def end(self) -> TurnEnd:
        return end_of_turn(
            self._tokenizer, lambda messages: apply_chat_template(self._tokenizer, messages, False, self._chosen)
        )

    def answer(self, prompt: Rendered, text: str, *, sampled: bool = False) -> str:
        """The answer as the template writes the whole conversation. Some templates drop its reasoning: then the answer as it was
        demonstrated, because that is what is sampled."""
        end = self.end
        text = end.stripped(text)
        whole = apply_chat_template(
            self._tokenizer, [*(prompt.messages or ()), {"role": "assistant", "content": text}], False, prompt.options
        )
        follows = whole.startswith(prompt.text) and whole.endswith(end.tail)
        if follows:
            rest = whole.removeprefix(prompt.text).removesuffix(end.tail)
            if CLOSE not in text or CLOSE in rest:
                return rest + end.before
        opened = opens_thinking(prompt.text) and whole.startswith(prompt.text[: prompt.text.rindex(OPEN)])
        if sampled or (CLOSE in text and (follows or opened)):
            return self._as_written(prompt, text)
        if opened:
            raise DataError(
                "the tokenizer's chat template opens <think> in the prompt, and this answer does not close it; write "
                f"{OPEN}{CLOSE} before it, or set data.template to the path of a Jinja file"
            )
        raise DataError(
            "the tokenizer's chat template renders the prompt in another way when an answer follows, so the model would be trained "
            f"on what it is never asked (prompt {prompt.text[-80:]!r}, with the answer {whole[-120:]!r}); set data.template to "
            "the path of a Jinja file"
        )


def make_template(
    name: str, tokenizer: Any, system: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> Template:
    """The template that `data.template` names.

    Args:
        system: the system message of prompts that have none, under a chat template.
        kwargs: keyword arguments of the chat template; a row's own take precedence.

    Raises:
        DataError: the template doesn't exist or doesn't parse, the tokenizer has no chat template, or the template has no place for
            `system` or `kwargs`.
    """
    if kwargs and not is_chat(name):
        raise DataError(
            f"data.template {name} has no place for data.chat_template_kwargs; drop them, or set data.template=chat"
        )
    match name.partition(":")[0] if is_chat(name) else name:
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
            chosen = _chosen(name, tokenizer)
            shared = {**chosen, **_checked_kwargs(kwargs, "data.chat_template_kwargs", tokenizer)}
            return ChatTemplate(_chat(tokenizer, R1_SYSTEM if name == "r1" else system, shared), tokenizer, chosen)
        case "raw" | "r1_zero":
            if system is not None:
                raise DataError(
                    f"data.template {name} has no place for data.system; drop it, or set data.template=chat"
                )
            return Template(_text("{prompt}" if name == "raw" else R1_ZERO, name, tokenizer), tokenizer)
        case _:
            return Template(_jinja(Path(name), tokenizer, system), tokenizer)


def is_chat(name: str) -> bool:
    """Whether `data.template` names a chat template of the tokenizer."""
    return name in CHAT or name.startswith("chat:")


def _chosen(name: str, tokenizer: Any) -> dict[str, Any]:
    """The keyword argument that selects one of a tokenizer's several templates; empty for other tokenizers.

    Raises:
        DataError: it has none of this name, or several without a default.
    """
    there, wanted = tokenizer.chat_template, name.partition(":")[2]
    if not isinstance(there, dict):
        if wanted:
            raise DataError(
                f"data.template is {name!r}, and the tokenizer of {_name(tokenizer)} has one chat template, without a name; "
                "use chat"
            )
        return {}
    names = ", ".join(map(str, there))
    if wanted and wanted not in there:
        raise DataError(
            f"data.template is {name!r}, and the tokenizer of {_name(tokenizer)} has no chat template of that name; it has: {names}"
        )
    if not wanted and "default" not in there:
        raise DataError(
            f"the tokenizer of {_name(tokenizer)} has several chat templates ({names}) and none is called default; choose one: "
            f"data.template=chat:{next(iter(there), 'NAME')}"
        )
    return {"chat_template": wanted} if wanted else {}


def _name(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "the model"


def _chat(tokenizer: Any, system: str | None, kwargs: Mapping[str, Any]) -> Render:
    def render(prompt: Any, columns: dict[str, Any]) -> Rendered:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if system is not None and messages[0]["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
        options: Mapping[str, Any] | None = kwargs or None
        if columns.get(KWARGS) is not None or columns.get(TOOLS) is not None:
            own = _checked_kwargs(columns.get(KWARGS), f"column {KWARGS!r}", tokenizer)
            options = {**kwargs, TOOLS: _tools(columns.get(TOOLS)), **own}
        return Rendered(
            apply_chat_template(tokenizer, messages, True, options), messages, add_special_tokens=False, options=options
        )

    return render


def apply_chat_template(
    tokenizer: Any, messages: list[dict[str, Any]], ask: bool, options: Mapping[str, Any] | None
) -> str:
    """The text of the conversation; with `ask` it includes the beginning of the assistant's turn."""
    try:
        text: str = within_thread_s(
            RENDER_S,
            lambda: tokenizer.apply_chat_template(
                messages, add_generation_prompt=ask, tokenize=False, **(options or {})
            ),
        )
    except TooLongError:
        raise DataError(f"the chat template of the tokenizer of {_name(tokenizer)} {_ENDLESS}") from None
    # A template is a program that came with the model, and may fail in any way.
    except Exception as e:
        raise DataError(f"the tokenizer's chat template refuses the conversation: {told(e)}") from None
    return text


def _checked_kwargs(value: Any, where: str, tokenizer: Any) -> dict[str, Any]:
    """The checked keyword arguments. A row of a Parquet file has the keys of all rows, null for those it lacks itself."""
    value = _parsed(value)
    if value is None or value == {}:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise DataError(
            f"expected {where} to be a mapping such as {{enable_thinking: false}}, got {type(value).__name__} {value!r:.60}"
        )
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {TOOLS, "documents", "kwargs"} | {
        "messages"
    }
    if taken := sorted(ours.intersection(value)):
        raise DataError(f"{where} holds {taken[0]!r}, which is no variable of a chat template; remove it")
    out = {k: v for k, v in value.items() if v is not None}
    return {**out, TOOLS: _tools(out[TOOLS])} if TOOLS in out else out


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools as JSON schemas, or their text, as in TRL. An empty list becomes None: some templates write a heading for it."""
    value = _parsed(value)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(
            f"expected column {TOOLS!r} to be a list of JSON schemas, got {type(value).__name__} {value!r:.60}"
        )
    return value or None


def _parsed(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json_text.read(value)
    except ValueError:
        return value


def _text(template: str, name: str, tokenizer: Any) -> Render:
    bos = getattr(tokenizer, "bos_token", None)

    def render(prompt: Any, _columns: dict[str, Any]) -> Rendered:
        if not isinstance(prompt, str):
            raise DataError(
                f"the prompt is a conversation, and data.template {name} takes a string; set data.template=chat, "
                "or map a column that holds the text: data.train.columns={prompt: NAME}"
            )
        text = template.replace("{prompt}", prompt)
        return Rendered(text, None, add_special_tokens=not (bos and text.startswith(bos)))

    return render


def _jinja(path: Path, tokenizer: Any, system: str | None) -> Render:
    if path.is_dir():
        raise DataError(f"data.template {str(path)!r} is a folder; name the Jinja file in it")
    if not path.is_file():
        raise DataError(f"data.template {str(path)!r} is neither a file nor one of {', '.join(BUILT_IN)}, chat:NAME")
    # Sandboxed like Transformers' own chat templates: a template is often downloaded with the data.
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=False, trim_blocks=True, lstrip_blocks=True
    )
    try:
        template = environment.from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"data.template {str(path)!r} can't be read: {e}") from None
    except jinja2.TemplateSyntaxError as e:
        raise DataError(f"{path}, line {e.lineno}: not a valid Jinja template: {e.message}") from None
    except (SyntaxError, RecursionError) as e:
        raise DataError(f"{path}: not a Jinja template that can be compiled: {told(e)}") from None
    bos = getattr(tokenizer, "bos_token", None) or ""
    eos = getattr(tokenizer, "eos_token", None) or ""

    def render(prompt: Any, columns: dict[str, Any]) -> Rendered:
        messages: list[dict[str, Any]] | None = None if isinstance(prompt, str) else list(prompt)
        values = {"prompt": prompt, "messages": messages, "system": system, "columns": columns}
        try:
            text = within_thread_s(RENDER_S, lambda: template.render(**values, bos_token=bos, eos_token=eos))
        except TooLongError:
            raise DataError(f"{path} {_ENDLESS}") from None
        except Exception as e:
            raise DataError(f"{path}: {told(e)}; known names: {', '.join(values)}, bos_token, eos_token") from None
        return Rendered(text, messages, add_special_tokens=not (bos and text.startswith(bos)))

    return render
