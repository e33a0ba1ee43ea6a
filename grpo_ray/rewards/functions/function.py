"""The contract of a reward function, which is TRL's: a function written for TRL runs here unchanged.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called by keyword, with whole groups (`reward.unit`). Every argument is a list with one entry per sample. `prompts` are as
the rows have them, before any template. Where a row's prompt is text, `completions` are text, also under a chat template; where it
is a conversation, they are `[{"role": "assistant", "content": ...}]`. `completion_ids` are the tokens. Then come all other columns
of the data set, None where a row lacks one, and the `args` of the recipe as they are, which come before a column of the same name.

It gives one number per sample, or None where it does not apply; an `Explained` number says why beside it; a RewardError in a
number's place fails that sample alone. It may be `async def`, and an instance with `__call__`; a class, or a function that makes
the reward from `args` alone (TRL's `get_soft_overlong_punishment`), is called with `args` once.

`log_extra(column, values)`, `log_metric(name, value)` and `trainer_state` are TRL's, and passed to those that name them or take
`**kwargs`: see `rewards.logs` and `types.TrainerState`. TRL's `environments` are not supported. verl's `compute_score` is known by
its parameter `solution_str`, see `rewards.verl`.

A built-in reward gets options from `args` alone: of the columns it sees those that it declares (`Columns`), whatever others are
called, and its prompts are the conversations that the model was asked in.

One thing more than TRL's: for `algorithm.advantage: process` it may give, instead of a number, what each step of the
sample is worth, `[(end, reward), ..]`: `end` is the index in `completion_ids` of the step's last token, ascending. A number
is one step, which ends at the last token. People, metrics and evaluations see the sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo_ray.data.thinking import begun
from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.parts import Part, part_of
from grpo_ray.rewards.functions.logs import CallLog
from grpo_ray.suggest import closest, did_you_mean
from grpo_ray.types import TrainerState

Conversation = list[dict[str, Any]]
Completions = Sequence[str | Conversation]
Values = Sequence[float | Sequence[tuple[int, float]] | RewardError | None]
RewardCallable = Callable[..., Values | Awaitable[Values]]

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# TRL leaves these out of the columns too; they would be the row's own, not the sample's.
NOT_COLUMNS = frozenset({"prompt", "completion", *RESERVED})
SOURCE = "source"


@dataclass(frozen=True)
class Columns:
    """The columns that a built-in reward takes from the data; every other parameter is an option."""

    required: tuple[tuple[str, ...], ...] = ()
    """One of each of these has to be there. The function gets it under the first of the names; it does not apply to a row in which
    it is null."""
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.optional, *(name for names in self.required for name in names)})


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
    trainer: TrainerState | None = None
    """Of the newest of the samples; None: nothing is trained."""

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
            trainer=self.trainer,
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
    required: tuple[tuple[str, ...], ...] = ()
    """Columns that it can't do without: one of each of these. `a.b` is entry b of column a."""
    declared: Columns | None = None
    """Of a built-in: the only columns that it gets."""
    per_sample: bool = False
    """It judges samples one by one, and `reward.unit: auto` calls it so."""
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
        if self.declared is not None:
            given = [v for names in self.declared.required if (v := _coalesced(inputs.columns, names)) is not None]
            rows = [i for i in rows if all(values[i] is not None for values in given)]
        if not self.sources:
            return list(rows)
        if SOURCE not in inputs.columns:
            raise RewardError(
                f"reward {self.name!r} is for the sources {', '.join(self.sources)}, and the row has no column {SOURCE!r}; map one "
                f"to it, e.g. data.train.columns: {{{SOURCE}: NAME}}"
            )
        return [i for i in rows if inputs.columns[SOURCE][i] in self.sources]

    def keywords(self, inputs: ScoreInputs, log: CallLog) -> dict[str, Any]:
        """The keyword arguments of one call: all of them, or those that it names.

        Raises:
            RewardError: a column that it needs is not there.
        """
        columns = {k: v for k, v in inputs.columns.items() if k not in NOT_COLUMNS}
        for names in self.required:
            if not any(has_column(columns, name) for name in names):
                raise RewardError(missing_column(self.name, names, columns))
        everything: dict[str, Any] = {
            **(columns if self.declared is None else _declared(self.declared, columns)),
            **self.args,
            "prompts": inputs.prompts,
            "completions": inputs.completions,
            "completion_ids": inputs.completion_ids,
            "trainer_state": inputs.trainer or NotTraining(),
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
        }
        if self.accepts is None:
            return everything
        return {k: v for k, v in everything.items() if k in self.accepts}


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """Of a row's column `a`, or of entry b of its column a for `a.b`; None without."""
    if name in row:
        return row[name]
    column, _, entry = name.partition(".")
    inside = row.get(column)
    return inside.get(entry) if isinstance(inside, Mapping) else None


def has_value(row: Mapping[str, Any], name: str) -> bool:
    """Is there a place for it, null or not?"""
    column, _, entry = name.partition(".")
    inside = row.get(column)
    return name in row or (isinstance(inside, Mapping) and entry in inside)


def has_column(columns: Mapping[str, Any], name: str) -> bool:
    """Is there such a column? Of `a.b` its first part is looked for."""
    return name in columns or name.partition(".")[0] in columns


def missing_column(reward: str, names: Sequence[str], there: Iterable[str], where: str = "") -> str:
    """What to say where a reward has none of the columns that it needs one of; `where`: the option of the data set, if it is not in
    one row alone."""
    known = sorted(map(str, there))
    wanted = " or ".join(map(repr, names))
    close = next((m for name in names if (m := closest(name, known, cutoff=0.7)) is not None), "NAME")
    return (
        f"reward {reward!r} needs the column {wanted}; {where or 'the row'} has {', '.join(known) or 'none'}; map one to it, e.g. "
        f"{where or 'data.train'}.columns: {{{next(n for n in names if '.' not in n)}: {close}}}"
    )


def _declared(declared: Columns, columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    out = {name: columns[name] for name in declared.optional if name in columns}
    for names in declared.required:
        if (values := _coalesced(columns, names)) is not None:
            out[names[0]] = values
    return out


def _coalesced(columns: Mapping[str, list[Any]], names: Sequence[str]) -> list[Any] | None:
    """[S] of each row the first of these columns that is not null; None: there is none of them."""
    found = [columns[name] for name in names if name in columns]
    if len(found) < 2:
        return found[0] if found else None
    return [next((v for v in values if v is not None), None) for values in zip(*found, strict=True)]


class NotTraining:
    """`trainer_state` where nothing is trained (`sample`, `eval`): a reward that goes by the step has no right value there."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state.{name} is not known here: nothing is trained by `sample` and `eval`")


def inspect_function(
    name: str, call: Callable[..., Any], weight: float, args: dict[str, Any], declared: Columns | None = None
) -> RewardFunction:
    """Read the signature, so that what can't work is said before the run rather than at its first sample.

    Args:
        declared: the columns of a built-in; None: a user's function, whose parameters are columns.

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
    needed = [p.name for p in by_keyword if p.default is p.empty and p.name not in args and p.name not in RESERVED]

    reserved = [k for k in args if k in NOT_COLUMNS]
    if reserved:
        raise RewardError(
            f"reward {name!r}: args can't hold {reserved[0]!r}, which every call gets from the sample; remove it"
        )
    unknown = [] if open_ended else [k for k in args if k not in names]
    if unknown:
        options = [n for n in names if n not in RESERVED]
        raise RewardError(f"reward {name!r} takes no argument {unknown[0]!r}; {_suggest(unknown[0], options)}")
    if "environments" in needed:
        raise RewardError(
            f"reward {name!r} requires 'environments', which TRL's trainer makes of its environment_factory; there are none here: "
            "give that parameter a default of None"
        )
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise RewardError(
            f"reward {name!r} is called by keyword, but its parameter {positional[0]!r} "
            "is positional-only; drop the `/`"
        )
    accepts = None if open_ended else names
    if declared is None:
        return RewardFunction(name, call, weight, dict(args), accepts, tuple((n,) for n in needed))
    options = [n for n in needed if n not in declared.names]
    if options:
        raise RewardError(
            f"reward {name!r} needs args: {{{options[0]}: ...}}; a column of that name is not taken for it"
        )
    return RewardFunction(
        name, call, weight, dict(args), accepts, declared.required, declared=declared, per_sample=True
    )


def _suggest(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known, f"known: {', '.join(sorted(known)) or 'none'}", cutoff=0.5, show=repr)


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
