"""The contract of a reward function, which is TRL's: a function written for TRL runs here unchanged.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

It is called by keyword, with whole groups (`reward.unit`). Every argument is a list with one entry per sample. `prompts` are as in
the rows, before any template. If a row's prompt is text, `completions` are text, also under a chat template; if it is a
conversation, they are `[{"role": "assistant", "content": ...}]`. `completion_ids` are the tokens. Then come all other columns of
the data set, None if a row lacks one, and the `args` of the recipe as they are, which override a column of the same name.

It returns one number per sample, or None if it does not apply; an `Explained` number carries its reason; a RewardError in place of
a number fails only that sample. It may be `async def`, and an instance with `__call__`; a class, or a function that creates the
reward from `args` alone (TRL's `get_soft_overlong_punishment`), is called with `args` once.

`log_extra(column, values)`, `log_metric(name, value)` and `trainer_state` are TRL's, and passed to functions that name them or take
`**kwargs`: see `logs` and `types.TrainerState`. TRL's `environments` are passed to functions that name them, which
run once an episode, where its environment lives. verl's `compute_score` is recognised by
its parameter `solution_str`, see `verl`.

A built-in reward gets options from `args` only: it sees the columns that it declares (`Columns`), whatever the names of the others,
and its prompts are the conversations that the model saw.

The contract extends TRL's: for `algorithm.advantage: process` it may return, instead of a number, the reward of each step
of the sample, `[(end, reward), ..]`: `end` is the index in `completion_ids` of the step's last token, ascending. A number
is one step, which ends at the last token. Reports, metrics and evaluations show the sum.
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

ENVIRONMENTS = "environments"
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", ENVIRONMENTS)
# TRL leaves these out of the columns too; they would be the row's own, not the sample's.
NOT_COLUMNS = frozenset({"prompt", "completion", *RESERVED})
SOURCE = "source"


@dataclass(frozen=True)
class Columns:
    """The columns that a built-in reward takes from the data; every other parameter is an option."""

    required: tuple[tuple[str, ...], ...] = ()
    """Groups of columns, one of each of which has to exist. The function gets it under the first of the names; it does not apply to
    a row in which it is null."""
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.optional, *(name for names in self.required for name in names)})


@dataclass(frozen=True)
class ScoreInputs:
    """The input of a reward function for S samples, built by the reward worker."""

    prompts: Completions
    """The prompts, [S]."""
    completions: Completions
    """The completions, [S]."""
    completion_ids: list[list[int]]
    """The completions as [S] lists of [T] tokens."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> column, [S]."""
    steps: list[int | None] | None = None
    """The step [S] at which each sample was dispatched; None, or None for all, outside steps, in an evaluation."""
    opened: list[bool] | None = None
    """Whether the prompt's template already wrote `<think>`, [S]; None: for no sample."""
    trainer: TrainerState | None = None
    """The trainer state of the newest of the samples; None if nothing is trained."""
    environments: list[Any] | None = None
    """The environment of each sample, [S], where the function is called beside them."""

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The number of tokens of each completion, [S]."""
        return tuple(len(ids) for ids in self.completion_ids)

    def take(self, rows: Sequence[int], part: Part = "all", *, with_opening: bool = False) -> ScoreInputs:
        """These samples, with this part of their completions; tokens stay whole.

        Args:
            with_opening: whether a `<think>` that the template wrote counts as the completion's.
        """
        opened = self.opened or [False] * len(self)
        return ScoreInputs(
            [self.prompts[i] for i in rows],
            [_take_part(self.completions[i], part, opened=opened[i], with_opening=with_opening) for i in rows],
            [self.completion_ids[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
            trainer=self.trainer,
            environments=None if self.environments is None else [self.environments[i] for i in rows],
        )


@dataclass(frozen=True)
class RewardFunction:
    """A reward function, found and checked against its recipe entry; created by `resolve`."""

    name: str
    call: RewardCallable
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    accepts: frozenset[str] | None = None
    """The parameters that it names; None: it takes any (`**kwargs`)."""
    required: tuple[tuple[str, ...], ...] = ()
    """Groups of columns, one of each of which it requires. `a.b` is entry b of column a."""
    declared: Columns | None = None
    """The only columns that a built-in gets; None for other functions."""
    per_sample: bool = False
    """Whether it judges samples one by one, and `reward.unit: auto` calls it so."""
    sources: tuple[str, ...] = ()
    """The values of column `source` to whose rows it applies; empty: to all."""
    from_step: int = 0
    """The first step at which it applies."""
    part: Part = "all"
    """The part of a completion that it sees."""
    built_in: bool = False
    """Whether it is built in, and sees a `<think>` of the prompt's template too; others see what was sampled, as in TRL."""
    in_episodes: bool = False
    """Whether it names `environments`, and so is called where they live."""
    requires_environments: bool = False
    """Whether it can't be called without them."""

    def applies_to(self, inputs: ScoreInputs) -> list[int]:
        """The indices of the samples to which it applies.

        Raises:
            RewardError: it is for some sources, and no column states them.
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
            RewardError: a column that it needs is missing.
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
        if inputs.environments is not None or self.in_episodes:
            everything[ENVIRONMENTS] = inputs.environments
        if self.accepts is None:
            return everything
        return {k: v for k, v in everything.items() if k in self.accepts}


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a row's column `a`, or of entry b of its column a for `a.b`; None if it is missing."""
    if name in row:
        return row[name]
    column, _, entry = name.partition(".")
    inside = row.get(column)
    return inside.get(entry) if isinstance(inside, Mapping) else None


def has_value(row: Mapping[str, Any], name: str) -> bool:
    """Whether the row has an entry of this name, null or not."""
    column, _, entry = name.partition(".")
    inside = row.get(column)
    return name in row or (isinstance(inside, Mapping) and entry in inside)


def has_column(columns: Mapping[str, Any], name: str) -> bool:
    """Whether there is such a column; for `a.b`, its first part."""
    return name in columns or name.partition(".")[0] in columns


def missing_column(reward: str, names: Sequence[str], there: Iterable[str], where: str = "") -> str:
    """The message for a reward that has none of the columns of which it needs one; `where`: the option of the data set, unless only
    one row is concerned."""
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
    """The first of these columns that is not null, for each row, [S]; None if none of them exists."""
    found = [columns[name] for name in names if name in columns]
    if len(found) < 2:
        return found[0] if found else None
    return [next((v for v in values if v is not None), None) for values in zip(*found, strict=True)]


class NotTraining:
    """The `trainer_state` if nothing is trained (`sample`, `eval`): a reward that depends on the step has no right value there."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"trainer_state.{name} is not known here: nothing is trained by `sample` and `eval`")


def inspect_function(
    name: str, call: Callable[..., Any], weight: float, args: dict[str, Any], declared: Columns | None = None
) -> RewardFunction:
    """Read the signature, so that unusable functions are reported before the run rather than at the first sample.

    Args:
        declared: the columns of a built-in; None: a user's function, whose parameters are columns.

    Raises:
        RewardError: the function does not take the `args`, or has parameters that only TRL's trainer can fill.
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
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if positional:
        raise RewardError(
            f"reward {name!r} is called by keyword, but its parameter {positional[0]!r} "
            "is positional-only; drop the `/`"
        )
    accepts = None if open_ended else names
    if declared is None:
        environments = next((p for p in by_keyword if p.name == ENVIRONMENTS), None)
        return RewardFunction(
            name,
            call,
            weight,
            dict(args),
            accepts,
            tuple((n,) for n in needed),
            in_episodes=environments is not None,
            requires_environments=environments is not None and environments.default is environments.empty,
        )
    options = [n for n in needed if n not in declared.names]
    if options:
        raise RewardError(
            f"reward {name!r} needs args: {{{options[0]}: ...}}; a column of that name is not taken for it"
        )
    return RewardFunction(
        name, call, weight, dict(args), accepts, declared.required, declared=declared, per_sample=True
    )


def check_environments(function: RewardFunction) -> None:
    """Raise RewardError for a function that needs environments, in a run that has none."""
    if function.requires_environments:
        raise RewardError(
            f"reward {function.name!r} requires 'environments', and this run has none: add the section environment, or give that "
            "parameter a default of None"
        )


def _suggest(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known, f"known: {', '.join(sorted(known)) or 'none'}", cutoff=0.5, show=repr)


class Explained(float):
    """A reward with its reason; reports show `detail` beside it."""

    detail: str

    def __new__(cls, value: float, detail: str) -> Explained:
        self = super().__new__(cls, value)
        self.detail = detail
        return self


def text_of(completion: str | Conversation) -> str:
    """The text of one completion, conversational or not."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def _take_part(completion: str | Conversation, part: Part, *, opened: bool, with_opening: bool) -> str | Conversation:
    if part == "all" and not (opened and with_opening):
        return completion
    text = text_of(completion)
    text = part_of(begun(text) if opened else text, part)
    return text if isinstance(completion, str) else [{**completion[0], "content": text}]
