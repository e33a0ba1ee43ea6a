"""Suffixes: the ids between two turns of the model, from its end-of-turn token to the next generation prompt.

    ids of the turn, as sampled, with its end-of-turn token | rest of that line, new messages, generation prompt | next turn
                                                            |<------------------ suffix ------------------------>|

A made-up conversation is templated without the new messages and with them. What the second has after the end of the made-up answer
is the suffix. It is tokenized behind the end-of-turn token, since some tokens take the white space after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from grpo_ray.data.templates import TOOLS, apply_chat_template
from grpo_ray.data.thinking import CLOSE, OPEN, opens_thinking
from grpo_ray.data.turns import PROBE, control_tokens, end_of_turn
from grpo_ray.errors import ConfigError, DataError

TEMPLATE = "chat_template"
_ASKED = [{"role": "user", "content": "?"}]
_HEARD = "GrpoRayAsksWhereThisIsWritten"
_THOUGHT = f"{OPEN}\nGrpoRayAsksWhatBecomesOfThis\n{CLOSE}\n\n"
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")
_SHOWN = 60
"""The number of characters shown of a text on either side of a difference."""


@dataclass(frozen=True)
class _Form:
    """How a template wants an assistant's message with calls: they differ, and fail on the others."""

    content: str | None
    arguments: Any

    def message(self, calls: Sequence[str], thought: str = "") -> dict[str, Any]:
        said = [_call(number, name, self.arguments) for number, name in enumerate(calls)]
        content = thought + (self.content or "") if thought else self.content
        return {"role": "assistant", "content": content, "tool_calls": said}


_FORMS = [_Form("", {}), _Form(None, {}), _Form(None, "{}"), _Form("", "{}")]


class TurnSuffixes:
    """What follows a turn of the model, under one chat template."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None,
        tools: list[dict[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> None:
        """
        Args:
            template: a chat template, or the name of one of the tokenizer's; None: the tokenizer's own.
            tools: the JSON schemas of the tools that the prompt shows.
            kwargs: further keyword arguments of the chat template.
        """
        self._tokenizer = tokenizer
        self.options = {
            **(kwargs or {}),
            **({TEMPLATE: template} if template is not None else {}),
            **({TOOLS: tools} if tools else {}),
        }
        self._known: set[tuple[str, ...]] = set()
        """Roles of messages that the template is known to write."""
        self._form: _Form | None = None

    def after(self, messages: list[dict[str, Any]], *, calls: Sequence[str] = ()) -> list[int]:
        """The ids that follow those of a turn that ended with its end-of-turn token, up to the next generation prompt.

        Args:
            messages: tool results, or a user's observation.
            calls: the names of the tools that the turn called, in order; by default those of the tool results.

        Raises:
            ConfigError: the template can't write these messages after an answer that stays as it was.
        """
        names = _names(messages, calls)
        roles = tuple(str(m["role"]) for m in messages)
        if roles not in self._known:
            probes = [{**m, "content": f"{_HEARD}{number}"} for number, m in enumerate(messages)]
            _, text = self._suffix(probes, names)
            self._check_written(text, probes)
            self._known.add(roles)
        end, text = self._suffix(messages, names)
        ids: list[int] = self._tokenizer(end + text, add_special_tokens=False)["input_ids"]
        if ids[:1] != [self._ends[end]]:
            raise ConfigError(
                f"the tokenizer makes {end!r}, which ends a turn, no token of its own; episodes need one that is never merged "
                "with its neighbours"
            )
        return ids[1:]

    @cached_property
    def end_id(self) -> int:
        """The token that ends a turn without calls."""
        return end_of_turn(self._tokenizer, lambda messages: self.text(messages, ask=False)).id

    @cached_property
    def _ends(self) -> dict[str, int]:
        """Text -> id of the tokens that may end a turn."""
        tokens = control_tokens(self._tokenizer)
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        return {text: i for text, i in tokens.items() if i in special or i == self.end_id}

    @cached_property
    def _end(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(t) for t in sorted(self._ends, key=len, reverse=True)))

    def text(self, messages: list[dict[str, Any]], *, ask: bool) -> str:
        """The conversation as text; with `ask` it includes the generation prompt."""
        return apply_chat_template(self._tokenizer, messages, ask, self.options)

    def _suffix(self, messages: Sequence[Mapping[str, Any]], calls: Sequence[str]) -> tuple[str, str]:
        """The end-of-turn token, and the text that follows it.

        Raises:
            ConfigError: no such token is written.
        """
        answer = self.answer(calls)
        said = [*_ASKED, answer]
        # A template may write today's date: what is templated on either side of midnight differs before the answer.
        for _ in range(2):
            before, after = self.text(said, ask=False), self.text([*said, *_answered(messages, calls)], ask=True)
            place = self._place_of_end(before, after, calls)
            if place is not None:
                return after[slice(*place)], after[place[1] :]
        raise ConfigError(_changed(before, after, "an answer is written in another way once a message follows it"))

    def _place_of_end(self, before: str, after: str, calls: Sequence[str]) -> tuple[int, int] | None:
        """Where the end-of-turn token of the made-up answer, the last thing in `before`, stands in `after`."""
        marker = calls[-1] if calls else PROBE
        said = before.rfind(marker) + len(marker)
        shared = _num_shared(before, after)
        if said < len(marker) or shared < said:
            return None
        found = [m for m in self._end.finditer(before, said) if m.end() <= shared]
        if found:
            return found[-1].span() if not self._end.sub("", before[found[-1].end() :]).strip() else None
        # The token that ends the turn is the first of the message that follows (GLM).
        if not after.startswith(before.rstrip()):
            return None
        following = self._end.match(after, len(before.rstrip()) + _blank(after, len(before.rstrip())))
        return following.span() if following else None

    def answer(self, calls: Sequence[str] = (), thought: str = "") -> dict[str, Any]:
        """A made-up turn of the model, in a form that the template takes."""
        if not calls:
            return {"role": "assistant", "content": thought + PROBE}
        if self._form is None:
            self._form = next((form for form in _FORMS if self._takes(form, calls)), None)
        if self._form is None:
            raise ConfigError(
                "the chat template does not write calls of tools, so the model would not see what it called; use a model whose "
                "template does, or set environment.template to one that does"
            )
        return self._form.message(calls, thought)

    def _takes(self, form: _Form, calls: Sequence[str]) -> bool:
        try:
            text = self.text([*_ASKED, form.message(calls)], ask=False)
        except DataError:
            return False
        return all(text.count(name) > self.text(_ASKED, ask=False).count(name) for name in calls)

    def without_end(self, text: str) -> str:
        """The text of a conversation without the end of its last turn."""
        return re.sub(rf"(?:\s|{self._end.pattern})*\Z", "", text)

    def _check_written(self, text: str, probes: Sequence[Mapping[str, Any]]) -> None:
        missing = next((m for m in probes if m["content"] not in text), None)
        if missing is not None:
            raise ConfigError(
                f"the chat template does not write messages of role {missing['role']!r}, so the model would never see them "
                f"(it gives {text[-120:]!r}); use a model whose template does, or set environment.template to one that does"
            )


def _blank(text: str, start: int) -> int:
    return len(text) - start - len(text[start:].lstrip())


def _names(messages: Sequence[Mapping[str, Any]], calls: Sequence[str]) -> list[str]:
    """The names for a made-up turn; the model may have called what is no name at all."""
    named = calls or [str(m.get("name", "tool")) for m in messages if m["role"] == "tool"]
    return [name if _NAME.fullmatch(name) else "unknown" for name in named]


def _call_id(number: int) -> str:
    """Nine letters and digits: what Mistral's templates insist on."""
    return f"call{number % 100_000:05d}"


def _call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": _call_id(number), "type": "function", "function": {"name": name, "arguments": arguments}}


def _answered(messages: Sequence[Mapping[str, Any]], calls: Sequence[str]) -> list[dict[str, Any]]:
    """The messages, tool results with the id of their call."""
    results = iter(range(len(calls)))
    return [{**m, "tool_call_id": _call_id(next(results, 0))} if m["role"] == "tool" else dict(m) for m in messages]


def _num_shared(one: str, other: str) -> int:
    """The number of characters that both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _changed(before: str, after: str, what: str) -> str:
    at = _num_shared(before, after)
    one, other = (text[max(0, at - _SHOWN) : at + _SHOWN] for text in (before, after))
    return (
        f"the chat template does not keep the text of earlier turns: {what}: first {one!r}, then {other!r}. Tokens that were "
        "sampled stay as they are, so the conversation would not be the template's; set environment.template to a chat template "
        "that writes every turn as it was"
    )


def check_keeps_prefix(
    tokenizer: Any,
    template: str | None,
    tools: list[dict[str, Any]] | None,
    kwargs: Mapping[str, Any] | None,
    *,
    roles: Sequence[str] = ("user",),
) -> None:
    """Check that the template writes every turn in the same way whatever follows it, reasoning included.

    Args:
        roles: the roles of the messages that an environment sends, `user` or `tool`.

    Raises:
        ConfigError: it does not, or has no place for such messages; the message shows the first difference.
    """
    suffixes = TurnSuffixes(tokenizer, template, tools, kwargs)
    names = [str(t.get("function", t).get("name", "tool")) for t in tools or ()] or ["tool"]
    try:
        for role in roles:
            _check_role(suffixes, role, names[0])
    except DataError as e:
        raise ConfigError(
            f"{e}; set environment.template to a chat template that takes messages of an environment"
        ) from None


def _check_role(suffixes: TurnSuffixes, role: str, name: str) -> None:
    calls = [name] if role == "tool" else []
    message = {"role": role, "content": "!"} | ({"name": name} if calls else {})
    suffixes.after([message], calls=calls)
    for thought in _thoughts(suffixes):
        turn = suffixes.answer(calls, thought)
        if thought and thought not in str(turn["content"]):
            continue
        heard = _answered([message], calls)
        said = [*_ASKED, turn, *heard, turn, *heard]
        whole = suffixes.text([*said, suffixes.answer(thought=thought)], ask=False)
        for place in (1, 3):
            _check_turn(suffixes, said, place, whole)


def _thoughts(suffixes: TurnSuffixes) -> list[str]:
    """What the model writes before its answers: its reasoning, nothing, or either."""
    prompt = suffixes.text([*_ASKED], ask=True)
    if opens_thinking(prompt):
        return [_THOUGHT]
    return [""] if prompt.rstrip().endswith(CLOSE) else ["", _THOUGHT]


def _check_turn(suffixes: TurnSuffixes, said: list[dict[str, Any]], place: int, whole: str) -> None:
    """Check that the turn at this place stands in the whole conversation as it does when it is the last, after its prompt."""
    last = suffixes.text(said[: place + 1], ask=False)
    kept = suffixes.without_end(last)
    if not whole.startswith(kept):
        raise ConfigError(_changed(kept, whole, "a turn is written in another way once others follow it"))
    asked = suffixes.text(said[:place], ask=True)
    if not whole.startswith(asked):
        raise ConfigError(_changed(asked, whole, "a turn does not continue its own generation prompt"))
