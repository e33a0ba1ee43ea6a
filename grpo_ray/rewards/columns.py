"""Checks, before a run, that the data have the columns that its rewards take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grpo_ray.config.reward import RewardConfig
from grpo_ray.data.prompts import PromptDataset, PromptSets
from grpo_ray.errors import RewardError
from grpo_ray.rewards.countdown import check_row
from grpo_ray.rewards.functions.function import SOURCE, check_environments, has_value, missing_column, value_of
from grpo_ray.rewards.table import described

_ROW_CHECKS: dict[str, Callable[[Mapping[str, Any]], None]] = {"countdown": check_row}
"""Built-in -> check of its rows."""


@dataclass(frozen=True)
class ColumnNeeds:
    """The columns that one reward of a recipe takes. Computed where its function can be imported, used where the data are."""

    reward: str
    required: tuple[tuple[str, ...], ...]
    """Groups of columns, one of each of which is required."""
    args: tuple[str, ...]
    """The names of the arguments that the recipe gives."""
    sources: tuple[str, ...]
    built_in: bool


class ColumnFacts(Protocol):
    """Facts about the columns of all rows of a data set."""

    @property
    def names(self) -> Sequence[str]: ...

    def lacking(self, names: Sequence[str], of: str | None, values: Sequence[str]) -> tuple[int, int, bool]:
        """(number of rows, number of those in which all of these columns are null or missing, whether any of them exists).

        Args:
            names: the names of columns; `a.b` is entry b of column a.
            of: the column that selects which rows count; None: all.
            values: the values of that column in rows that count.
        """
        ...


class RowFacts:
    """`ColumnFacts` of rows in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows
        self.names = list(dict.fromkeys(name for row in rows for name in row))

    def lacking(self, names: Sequence[str], of: str | None, values: Sequence[str]) -> tuple[int, int, bool]:
        rows = self._rows if of is None else [row for row in self._rows if row.get(of) in values]
        null = sum(all(value_of(row, name) is None for name in names) for row in rows)
        return len(rows), null, any(has_value(row, name) for row in rows for name in names)


def column_needs(reward: RewardConfig, *, imports: bool = True, environment: bool = False) -> list[ColumnNeeds]:
    """The needs of every function of a recipe. Raises RewardError if one of them can't be used.

    Args:
        imports: as in `described`.
        environment: whether the run has environments, for functions that name them.
    """
    found = [(config, described(config, imports=imports)) for config in reward.functions]
    for _, function in found if not environment else ():
        check_environments(function)
    return [ColumnNeeds(c.title, f.required, tuple(c.args), c.sources, c.built_in) for c, f in found]


def check_columns(
    needs: Sequence[ColumnNeeds],
    prompts: PromptSets,
    *,
    train: bool,
    evaluation: bool,
    facts: Mapping[str, ColumnFacts] | None = None,
) -> list[str]:
    """Notices about the columns that rewards take from the sets in use.

    Args:
        needs: the columns that the rewards take.
        prompts: the data sets.
        train: whether `data.train` is used.
        evaluation: whether `data.eval` is used.
        facts: option of a data set -> facts of all its rows, if `prompts` has only a part of them.

    Raises:
        RewardError: a column that a reward needs is missing; names the existing ones.
    """
    sets = {"data.train": prompts.train} if train else {}
    if evaluation:
        sets |= eval_sets_told(prompts.eval)
    return check_sets(needs, sets, facts)


def eval_sets_told(sets: Mapping[str, PromptDataset]) -> dict[str, PromptDataset]:
    """Evaluation sets by the option that they come from."""
    return {f"data.eval.{name}" if name else "data.eval": found for name, found in sets.items()}


def check_sets(
    needs: Sequence[ColumnNeeds], sets: Mapping[str, PromptDataset], facts: Mapping[str, ColumnFacts] | None = None
) -> list[str]:
    """The notices of `check_columns`; `sets`: by the option that they come from."""
    for where, found in sets.items():
        for need in needs:
            _check_rows(need, where, found)
    return [
        note
        for where, found in sets.items()
        for of_all in [(facts or {}).get(where) or RowFacts(found.rows_of_columns)]
        for need in needs
        for note in _check(need, where, of_all)
    ]


def _check_rows(need: ColumnNeeds, where: str, found: PromptDataset) -> None:
    """Raises RewardError for a row that this reward could never score, whatever the answer."""
    check = _ROW_CHECKS.get(need.reward) if need.built_in else None
    if check is None:
        return
    for i, row in enumerate(found.rows_of_columns):
        if need.sources and row.get(SOURCE) not in need.sources:
            continue
        try:
            check(row)
        except RewardError as e:
            raise RewardError(f"{where}, row {found.item(i, 0).id.rpartition('/')[2]} of {found.name}: {e}") from None


def _check(need: ColumnNeeds, where: str, facts: ColumnFacts) -> list[str]:
    there = facts.names
    of = SOURCE if need.sources else None
    if need.sources:
        if SOURCE not in there:
            why = f" (it is for the sources {', '.join(need.sources)})"
            raise RewardError(missing_column(need.reward, (SOURCE,), there, where) + why)
        if not facts.lacking((), of, need.sources)[0]:
            return [
                f"reward {need.reward!r} applies to no row of {where}: none is of the sources {', '.join(need.sources)}"
            ]
    notes = [
        f"reward {need.reward!r} takes {name!r} from its args, and not the column of {where} that is called so"
        for name in need.args
        if name in there
    ]
    for names in need.required:
        num_rows, lacking, is_there = facts.lacking(names, of, need.sources)
        if lacking == num_rows and not is_there:
            raise RewardError(missing_column(need.reward, names, there, where))
        if lacking:
            of_mapping = any("." in name for name in names)
            what = "does not apply to" if need.built_in else "gets None for" + ", or fails at," * of_mapping
            wanted = " or ".join(map(repr, names))
            notes.append(
                f"reward {need.reward!r} {what} {lacking} of {num_rows} rows of {where}: they have no {wanted}"
            )
    return notes
