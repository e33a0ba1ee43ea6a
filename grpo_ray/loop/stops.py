"""Stop conditions of a completion, and the text of it that reward functions and people read.

    the model's end-of-sequence tokens + the template's end of a turn + rollout.stop_token_ids + rollout.stop -> Stops

A completion is decoded as the model wrote it, special tokens included (`<think>` is one in many tokenizers). Only the token that
ended the turn is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grpo_ray.config.schema import RunConfig
from grpo_ray.data.templates import is_chat, make_template
from grpo_ray.data.turns import TurnEnd
from grpo_ray.errors import ConfigError, DataError
from grpo_ray.models.files.loading import eos_ids, load_config, vocab_size

_TAG = re.compile(r"</\w+>")
"""The pattern of a closing tag, which belongs to the answer even where it is a special token that ends the completion."""


@dataclass(frozen=True)
class Stops:
    token_ids: tuple[int, ...]
    strings: tuple[str, ...]
    """Strings that end a completion; they are searched in the decoded text, special tokens included, and stay in it."""
    hidden: frozenset[int]
    """Those of `token_ids` that are left out at the end of the text: they end a turn and carry no content."""

    def read(self, tokenizer: Any, token_ids: Sequence[int]) -> str:
        """The text of a completion of [T] tokens."""
        ids = list(token_ids)
        if ids and ids[-1] in self.hidden:
            ids.pop()
        text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def describe(self, tokenizer: Any) -> str:
        """Human-readable form: `<|im_end|> (151645), '</answer>'`."""
        tokens = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in self.token_ids]
        return ", ".join([*tokens, *(repr(s) for s in self.strings)])


def template_end(tokenizer: Any, template: str) -> TurnEnd | None:
    """How data.template ends an assistant's turn; None outside chat templates, and where the template does not reveal it."""
    if not is_chat(template):
        return None
    try:
        return make_template(template, tokenizer).end
    except DataError:
        return None


def name_turn_end(model: Any, tokenizer: Any) -> None:
    """Name the end of the chat template's turns in generation_config.json of an exported model, so that it ends an answer in any
    program as it does here: a base model's files often name another token.
    """
    config, end = getattr(model, "generation_config", None), template_end(tokenizer, "chat")
    if config is None or end is None:
        return
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end.id not in named:
        config.eos_token_id = [*(i for i in named if i is not None), end.id]


def describe_end(tokenizer: Any, template: str) -> str:
    """Human-readable form of what ends a demonstration. Raises DataError if nothing does."""
    end = make_template(template, tokenizer).end
    whence = "as the chat template ends a turn" if end.token in end.tail else "the tokenizer's end-of-sequence token"
    return f"an answer ends with {end.token} ({end.id}), {whence}"


def stops_of_run(config: RunConfig, tokenizer: Any, model: str) -> Stops:
    """All stop conditions of a run. Raises ConfigError, see `find_stops`."""
    code = config.model.trust_remote_code
    return find_stops(
        tokenizer,
        eos_ids(model, tokenizer, trust_remote_code=code),
        template_end(tokenizer, config.data.template),
        vocab_size(load_config(model, trust_remote_code=code)),
        config.rollout.stop,
        config.rollout.stop_token_ids,
    )


def find_stops(
    tokenizer: Any,
    eos_ids: Sequence[int],
    end: TurnEnd | None,
    num_tokens: int,
    strings: Sequence[str] = (),
    token_ids: Sequence[int] = (),
) -> Stops:
    """Collect all stop conditions.

    Args:
        eos_ids: the end-of-sequence tokens of the model, see `grpo_ray.models.files.loading.eos_ids`.
        end: how the template ends a turn.
        num_tokens: the number of tokens that the model can sample.
        strings: `rollout.stop`.
        token_ids: `rollout.stop_token_ids`.

    Raises:
        ConfigError: a string can never occur, or the tokenizer does not have a token.
    """
    ends = [i for i in dict.fromkeys([*eos_ids, *([end.id] if end is not None else [])]) if i < num_tokens]
    special = {str(t.content): int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    last = min(num_tokens, len(tokenizer)) - 1
    for i in token_ids:
        if i > last:
            raise ConfigError(
                f"rollout.stop_token_ids holds {i}, and the model's tokens go from 0 to {last}; take it out"
            )
    for string in strings:
        _check_string(tokenizer, string, [str(tokenizer.convert_ids_to_tokens(i)) for i in ends])
    wanted = [*token_ids, *(special[s] for s in strings if special.get(s, num_tokens) < num_tokens)]
    names = {i: text for text, i in special.items()}
    hidden = {i for i in wanted if i in names and not _TAG.fullmatch(names[i])}
    return Stops(tuple(dict.fromkeys([*ends, *wanted])), tuple(strings), frozenset([*ends, *hidden]))


def _check_string(tokenizer: Any, string: str, ends: Sequence[str]) -> None:
    if not string:
        raise ConfigError("rollout.stop holds an empty text, which is nowhere to be found; take it out")
    for end in ends:
        if end in string.removesuffix(end):
            raise ConfigError(
                f"rollout.stop {string!r} can never match: a sample ends with its {end}, before the rest is written; "
                "take the rest away"
            )
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if not ids or (unknown is not None and unknown in ids and tokenizer.unk_token not in string):
        raise ConfigError(
            f"rollout.stop {string!r} can never match: the tokenizer has no tokens for all of it; use another text"
        )
