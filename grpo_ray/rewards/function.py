"""The contract of a reward function, which is TRL's: a function written for TRL runs here unchanged.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called by keyword. Every argument is a list with one entry per sample: `prompts` and `completions` are strings,
or conversations (`[{"role": "assistant", "content": ...}]`) where the row is conversational; `completion_ids` are the
tokens; then come all other columns of the data set, and the `args` of the recipe as they are. It gives one number per
sample, or None where it does not apply; an `Explained` number says why beside it; a RewardError in a number's place fails that
sample alone. It may be `async def`. TRL's `trainer_state`,
`log_extra` and `log_metric` are not passed.

One thing more than TRL's: for `algorithm.advantage: process` it may give, instead of a number, what each step of the
sample is worth, `[(end, reward), ..]`: `end` is the index in `completion_ids` of the step's last token, ascending. A number
is one step, which ends at the last token. People, metrics and evaluations see the sum.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.parts import Part, part_of
from grpo_ray.thinking import begun

Conversation = list[dict[str, Any]]
Completions = Sequence[str | Conversation]
Values = Sequence[float | Sequence[tuple[int, float]] | RewardError | None]
RewardCallable = Callable[..., Values | Awaitable[Values]]

RESERVED = ("prompts", "completions", "completion_ids")
# TRL leaves these out of the columns too; they would be the row's own, not the sample's.
NOT_COLUMNS = frozenset({"prompt", "completion", *RESERVED})
SOURCE = "source"
_TRAINER_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")


@dataclass(frozen=True)
class ScoreInputs:
    """What a reward function sees of S samples. Made by the reward actor."""

    prompts: Completions
    """[S]."""
    completions: Completions
    """[S]."""
    completion_ids: list[list[int]]
    """[S] lists of [T] tokens."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> [S]."""
    steps: list[int | None] | None = None
    """[S] steps done when each was asked for; None, or None for all: it is no step's, an evaluation's."""
    opened: list[bool] | None = None
    """[S] of which the prompt's template wrote `<think>` already; None: of none."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> tuple[int, ...]:
        """[S] tokens."""
        return tuple(len(ids) for ids in self.completion_ids)

    def take(self, rows: Sequence[int], part: Part = "all", *, with_opening: bool = False) -> ScoreInputs:
        """These samples, and of their completions this part; tokens stay whole.

        Args:
            with_opening: a `<think>` that the template wrote counts as the completion's.
        """
        opened = self.opened or [False] * len(self)
        return ScoreInputs(
            [self.prompts[i] for i in rows],
            [_take_part(self.completions[i], part, opened=opened[i], with_opening=with_opening) for i in rows],
            [self.completion_ids[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class RewardFunction:
    """A reward function, found and checked against its recipe entry. Made by `resolve`."""

    name: str
    call: RewardCallable
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    accepts: frozenset[str] | None = None
    """The parameters it names; None: it takes any (`**kwargs`)."""
    required: tuple[str, ...] = ()
    """Columns that it can't do without."""
    sources: tuple[str, ...] = ()
    """It applies to rows with one of these in their column `source`; empty: to all."""
    from_step: int = 0
    """It applies from this step on."""
    part: Part = "all"
    """What it sees of a completion."""
    built_in: bool = False
    """It sees a `<think>` that the prompt's template wrote as the completion's; others see what was sampled, as in TRL."""

    def applies_to(self, inputs: ScoreInputs) -> list[int]:
        """Which samples it is for.

        Raises:
            RewardError: it is for some sources, and there is no column that tells them.
        """
        rows: Sequence[int] = range(len(inputs))
        if self.from_step and inputs.steps is not None:
            steps = inputs.steps
            rows = [i for i in rows if (step := steps[i]) is None or step >= self.from_step]
        if not self.sources:
            return list(rows)
        if SOURCE not in inputs.columns:
            raise RewardError(
                f"reward {self.name!r} is for the sources {', '.join(self.sources)}, and the row has no column {SOURCE!r}; map one "
                f"to it, e.g. data.train.columns: {{{SOURCE}: NAME}}"
            )
        return [i for i in rows if inputs.columns[SOURCE][i] in self.sources]

    def keywords(self, inputs: ScoreInputs) -> dict[str, Any]:
        """The keyword arguments of one call: all of them, or those that it names.

        Raises:
            RewardError: a column that it needs is not there.
        """
        everything: dict[str, Any] = {
            **{k: v for k, v in inputs.columns.items() if k not in NOT_COLUMNS},
            "prompts": inputs.prompts,
            "completions": inputs.completions,
            "completion_ids": inputs.completion_ids,
            **self.args,
        }
        missing = [name for name in self.required if name not in everything]
        if missing:
            raise RewardError(
                f"reward {self.name!r} needs the column {missing[0]!r}; the row has "
                f"{sorted(inputs.columns) or 'none'}; map one to it, e.g. data.train.columns: {{{missing[0]}: NAME}}"
            )
        if self.accepts is None:
            return everything
        return {k: v for k, v in everything.items() if k in self.accepts}


def inspect_function(name: str, call: Callable[..., Any], weight: float, args: dict[str, Any]) -> RewardFunction:
    """Read the signature, so that what can't work is said before the run rather than at its first sample.

    Raises:
        RewardError: `args` that the function does not take, or parameters that only TRL's trainer can fill.
    """
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return RewardFunction(name, call, weight, dict(args))
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = frozenset(p.name for p in by_keyword)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = tuple(
        p.name for p in by_keyword if p.default is p.empty and p.name not in args and p.name not in RESERVED
    )

    reserved = [k for k in args if k in NOT_COLUMNS]
    if reserved:
        raise RewardError(
            f"reward {name!r}: args can't hold {reserved[0]!r}, which every call gets from the sample; remove it"
        )
    unknown = [] if open_ended else [k for k in args if k not in names]
    if unknown:
        options = [n for n in names if n not in RESERVED]
        raise RewardError(f"reward {name!r} takes no argument {unknown[0]!r}; {_suggest(unknown[0], options)}")
    trainers = [n for n in required if n in _TRAINER_ONLY]
    if trainers:
        raise RewardError(
            f"reward {name!r} requires {trainers[0]!r}, which only TRL's trainer passes; "
            "give that parameter a default of None"
        )
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise RewardError(
            f"reward {name!r} is called by keyword, but its parameter {positional[0]!r} "
            "is positional-only; drop the `/`"
        )
    return RewardFunction(name, call, weight, dict(args), None if open_ended else names, required)


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"


class Explained(float):
    """A reward that says why it is so; people see `detail` beside it."""

    detail: str

    def __new__(cls, value: float, detail: str) -> Explained:
        self = super().__new__(cls, value)
        self.detail = detail
        return self


def text_of(completion: str | Conversation) -> str:
    """The words of one completion, conversational or not."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _take_part(completion: str | Conversation, part: Part, *, opened: bool, with_opening: bool) -> str | Conversation:
    if part == "all" and not (opened and with_opening):
        return completion
    text = text_of(completion)
    text = part_of(begun(text) if opened else text, part)
    return text if isinstance(completion, str) else [{**completion[0], "content": text}]
