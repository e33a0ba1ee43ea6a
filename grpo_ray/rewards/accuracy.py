"""The reward for a right mathematical answer."""

from __future__ import annotations

from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.golds import GOLD_TIMES, TIMEOUT_S, golds_of, is_right, read_gold
from grpo_ray.rewards.answers.warm_up import warm_up
from grpo_ray.rewards.functions.function import Completions, text_of


def accuracy(
    completions: Completions,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[float | RewardError | None]:
    r"""1 if the completion's answer equals the gold answer by math-verify, else 0; None if the gold is not understood.

    Gold is column `answer` (`solution` where a row has none): a number of any type; a text that is one value (`\frac12`,
    `1,234`, `50%`, `5 cm`), a choice (`C`, `(C) 42`), or a solution with its answer after `####` (GSM8K), in a box, or called
    the answer; or a list of alternatives, each of which is right, and all of them together. Units are passed over. Not
    understood: words (`Paris`, `yes`; but `\text{Paris}` is read literally), dates, ranges (`3-5`), versions, empty ones, NaN.

    The completion's answer is searched after `</think>` and inside `<answer>` if there are such tags: a last line
    `#### 1,234` if the gold has that form, else the last `\boxed{..}`, else what follows `the answer is`, else the last
    value; in `$`, `\(`, `\[`, bold or back-ticks too. (TRL's `accuracy_reward` stops at LaTeX.)

    An answer that lists several values (`12 or 13`, `12, 13`, `x = 1 or x = 2`) is right only for a gold that has just
    these, in any order: 0 for the gold 12. `(1, 2)` is a pair, whose order counts, `1,2` two values, `1,234` a thousand and more.

    Range {0, 1}. `timeout_s`: CPU seconds for a completion, read and compared; one that takes longer (`(x+y+z+w)^{60}`) is
    wrong. A gold answer gets six times as many, and fails its sample beyond them. The clock is a signal, so it must run in a
    process's main thread, as in the reward workers.

    Source: math-verify 0.9; TRL `accuracy_reward`.

    Raises:
        RewardError: the row has neither column.
    """
    if answer is None and solution is None:
        raise RewardError(
            "reward 'accuracy' needs a column 'answer' or 'solution'; map one, e.g. data.train.columns: {answer: NAME}"
        )
    golds = golds_of(answer, solution, len(completions))
    return [_score(text_of(c), g, timeout_s) for c, g in zip(completions, golds, strict=True)]


def _score(completion: str, gold: Any, timeout_s: float) -> float | RewardError | None:
    try:
        golds = read_gold(gold, GOLD_TIMES * timeout_s)
    except RewardError as error:
        return error
    return float(is_right(completion, golds, timeout_s)) if golds else None


def load_parser(_args: dict[str, Any]) -> None:
    """Load math-verify with a first formula, which takes a second or more, before a sample's deadline runs."""
    warm_up()
