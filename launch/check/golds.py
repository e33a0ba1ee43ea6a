"""How many gold answers the reward `accuracy` understands, reported before a run: the rest gets no reward."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.prompts import PromptDataset, PromptSets
from grpo_ray.errors import RewardError
from grpo_ray.health.applicable import quoted
from grpo_ray.rewards.columns import ColumnFacts
from grpo_ray.rewards.functions.function import SOURCE

MAX_GOLDS = 2000
MAX_SECONDS = 20.0
_NUM_EXAMPLES = 3


@dataclass
class GoldReport:
    """What `accuracy` makes of the gold answers of one data set."""

    num_rows: int
    """The rows that the reward applies to."""
    num_read: int = 0
    num_unknown: int = 0
    examples: list[str] = field(default_factory=list)

    def text(self, what: str) -> str:
        """The text to print: one line, and a warning where not a single gold is understood."""
        asked = (
            f"{self.num_read:,}"
            if self.num_read == self.num_rows
            else f"{self.num_read:,} looked at, of {self.num_rows:,}"
        )
        if not self.num_unknown:
            return f"{what}: all understood by accuracy ({asked})"
        said = f"{what}: {self.num_unknown:,} not understood by accuracy ({asked}), e.g. {'; '.join(self.examples)}"
        if self.num_unknown < self.num_read:
            return f"{said}. Such rows get no reward"
        how = "map the right column to 'answer' in its columns, or use a reward that is made for these answers"
        lost = "learned from it" if what == "data.train" else "measured on it"
        return f"WARNING: {said}. No row would get a reward from accuracy, and nothing be {lost}: {how}"


def gold_rows(config: RunConfig, prompts: PromptSets, facts: Mapping[str, ColumnFacts]) -> list[tuple[str, str]]:
    """A line for each data set and each reward `accuracy` of the recipe.

    Args:
        config: the recipe.
        prompts: the prompts of its data sets.
        facts: option of a data set -> the facts of all its rows, where `prompts` has only some of them.
    """
    rows = []
    sets = [("data.train", config.data.train.path, prompts.train)]
    for name, source in config.data.eval_sets.items():
        sets.append((f"data.eval {name}".strip(), source.path, prompts.eval[name]))
    for function in config.reward.functions:
        if function.name == "accuracy":
            for option, path, dataset in sets:
                report = read_golds(dataset, path, function)
                if (of_all := facts.get(option.replace(" ", "."))) is not None:
                    of = SOURCE if function.sources else None
                    report.num_rows = of_all.lacking((), of, function.sources)[0]
                if report.num_rows:
                    rows.append(("golds", report.text(option)))
    return rows


def read_golds(dataset: PromptDataset, path: str, function: RewardFunctionConfig) -> GoldReport:
    """Read up to 2,000 golds, evenly spaced over the data set, for 20 s at most."""
    from grpo_ray.rewards.answers.golds import COLUMNS, GOLD_TIMES, TIMEOUT_S, gold_of, read_gold

    indices = _rows_of(dataset, function.sources)
    report = GoldReport(len(indices))
    timeout_s = GOLD_TIMES * float(function.args.get("timeout_s", TIMEOUT_S))
    end = time.monotonic() + MAX_SECONDS
    for index in _evenly(indices, MAX_GOLDS):
        if time.monotonic() > end:
            break
        report.num_read += 1
        column, gold = gold_of(dataset.rows_of_columns[index])
        try:
            if read_gold(gold, timeout_s):
                continue
            why = ""
        except RewardError:
            why = f" (more than {timeout_s:g} s to read)"
        report.num_unknown += 1
        if len(report.examples) < _NUM_EXAMPLES:
            said = quoted(gold) if column else f"nothing in {' or '.join(map(repr, COLUMNS))}"
            report.examples.append(f"{path}, row {dataset.item(index, 0).id.rpartition('/')[2]}: {said}{why}")
    return report


def _rows_of(dataset: PromptDataset, sources: Sequence[str]) -> list[int]:
    return [i for i, row in enumerate(dataset.rows_of_columns) if not sources or row.get(SOURCE) in sources]


def _evenly(indices: Sequence[int], count: int) -> list[int]:
    """Up to `count` of the indices, evenly spaced from the first one."""
    if len(indices) <= count:
        return list(indices)
    return [indices[i * len(indices) // count] for i in range(count)]
