"""The chat template of an episode: one that writes earlier turns as they were sampled, thinking included.

The model's own where it does. Templates of several families take the reasoning out of earlier answers; for these there is a small
change of the expression that does so, and all else stays the model's. A prompt of one turn is the same text under both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.episodes.suffix import TEMPLATE, check_keeps_prefix
from grpo_ray.errors import ConfigError, told

_ALWAYS = "true"
_THOUGHT_OR_OFF = "reasoning_content or (enable_thinking is defined and enable_thinking is false)"


@dataclass(frozen=True)
class Change:
    """How the templates of a family are changed: expressions, each of which a template has exactly once, and what they become."""

    family: str
    expressions: tuple[tuple[str, str], ...]

    def of(self, template: str) -> str | None:
        """The changed template; None: it is of another family."""
        if any(template.count(old) != 1 for old, _ in self.expressions):
            return None
        for old, new in self.expressions:
            template = template.replace(old, new)
        return template


CHANGES = (
    Change(
        "Qwen3",
        (
            ("loop.index0 > ns.last_query_index", _ALWAYS),
            ("loop.last or (not loop.last and reasoning_content)", _THOUGHT_OR_OFF),
        ),
    ),
    Change("Qwen3.5", (("loop.index0 > ns.last_query_index", _ALWAYS),)),
    Change("GLM-4.5", (("loop.index0 > ns.last_user_index and reasoning_content", "reasoning_content"),)),
    Change(
        "Nemotron 3",
        (
            (
                "truncate_history_thinking if truncate_history_thinking is defined else True",
                "truncate_history_thinking if truncate_history_thinking is defined else False",
            ),
        ),
    ),
    Change(
        "DeepSeek",
        (("{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}", ""),),
    ),
    Change(
        "LFM2.5",
        (
            (
                "preserve_thinking | default(false)",
                "preserve_thinking | default(true)",
            ),
        ),
    ),
)
"""The known changes; one is taken only where the changed template passes `check_keeps_prefix`."""


@dataclass(frozen=True)
class EpisodeTemplate:
    text: str | None
    """What `TurnSuffixes` takes as its template; None: the tokenizer's own."""
    told: str
    """Which it is, for `grpo-ray check`."""


def episode_template(
    tokenizer: Any,
    chosen: str | None,
    tools: list[dict[str, Any]] | None,
    kwargs: Mapping[str, Any] | None,
    *,
    roles: Sequence[str] = ("user",),
) -> EpisodeTemplate:
    """The template for the turns of an episode, checked.

    Args:
        chosen: `environment.template`, the path of a chat template; None: the model's own, changed if it has to be.
        tools: as `TurnSuffixes` takes them.
        kwargs: as `TurnSuffixes` takes them.
        roles: the roles of the messages that an environment sends.

    Raises:
        ConfigError: the template, and each known change of it, rewrites earlier turns or refuses such messages.
    """
    if chosen is not None:
        text = _read(Path(chosen))
        check_keeps_prefix(tokenizer, text, tools, kwargs, roles=roles)
        return EpisodeTemplate(text, f"{chosen}, instead of the model's own chat template")
    try:
        check_keeps_prefix(tokenizer, None, tools, kwargs, roles=roles)
    except ConfigError as e:
        found = _changed(tokenizer, tools, kwargs, roles)
        if found is None:
            raise ConfigError(str(e)) from None
        return found
    return EpisodeTemplate(None, "the model's own chat template")


def _changed(
    tokenizer: Any, tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any] | None, roles: Sequence[str]
) -> EpisodeTemplate | None:
    own = own_template(tokenizer, tools, kwargs)
    for change in CHANGES:
        text = change.of(own)
        if text is None:
            continue
        try:
            check_keeps_prefix(tokenizer, text, tools, kwargs, roles=roles)
        except ConfigError:
            continue
        how = f"the model's own chat template, changed as for {change.family}: earlier turns keep their reasoning"
        return EpisodeTemplate(text, how)
    return None


def own_template(tokenizer: Any, tools: list[dict[str, Any]] | None, kwargs: Mapping[str, Any] | None) -> str:
    """The text of the tokenizer's chat template, or of the one of several that Transformers would take.

    Raises:
        ConfigError: it has none.
    """
    there = getattr(tokenizer, "chat_template", None)
    if not isinstance(there, dict):
        if not there:
            raise ConfigError("the tokenizer has no chat template, and an episode needs one; set environment.template")
        return str(there)
    name = (kwargs or {}).get(TEMPLATE) or ("tool_use" if tools and "tool_use" in there else "default")
    if name not in there:
        raise ConfigError(f"the tokenizer has no chat template called {name!r}; it has: {', '.join(map(str, there))}")
    return str(there[name])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"environment.template {str(path)!r} can't be read: {told(e)}") from None


def with_template(tokenizer: Any, chosen: str | None) -> Any:
    """The tokenizer with the chat template that `environment.template` names; the same one without it."""
    if chosen is None:
        return tokenizer
    changed = copy.copy(tokenizer)
    changed.chat_template = _read(Path(chosen))
    return changed
