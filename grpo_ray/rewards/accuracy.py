"""Is the mathematical answer right?"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answer_tag import answer_of
from grpo_ray.rewards.function import Completions, text_of

# The whole rest of the line has to be a number: `#### Step 3` is a heading of a chatty model, not an answer.
_MARKED = re.compile(r"####[ \t]*(\$?[-+]?\$?\d[\d,]*(?:\.\d+)?%?)[ \t]*\.?[ \t]*$", re.MULTILINE)


def accuracy(
    completions: Completions,
    answer: list[Any] | None = None,
    solution: list[Any] | None = None,
    timeout_s: int = 3,
) -> list[float | None]:
    r"""1 if the completion's answer equals the gold answer by math-verify, else 0; None if the gold can't be parsed.

    Gold is column `answer` (or `solution`); where it holds `####` (GSM8K), what follows that. The completion's answer
    is looked for behind `</think>` and inside `<answer>` where there are such tags: a last line `#### 1,234` if the
    gold has that form, else its `\boxed{...}`, else other LaTeX, else the last expression. (TRL's `accuracy_reward`
    stops at LaTeX.)

    Range {0, 1}. `timeout_s`: each of parsing and comparing; an answer that takes longer (`9^{9^{9}}`) is wrong. The
    clock is a signal, so this has to run in a process's main thread, as it does in the reward actors.

    Source: math-verify 0.9; TRL `accuracy_reward`.

    Raises:
        RewardError: the row has neither column.
    """
    golds = answer if answer is not None else solution
    if golds is None:
        raise RewardError(
            "reward 'accuracy' needs a column 'answer' or 'solution'; map one, e.g. data.train.columns: {answer: NAME}"
        )
    return [_score(text_of(c), str(g), timeout_s) for c, g in zip(completions, golds, strict=True)]


def _score(completion: str, gold: str, timeout_s: int) -> float | None:
    from math_verify import verify

    # A number in the reasoning is not an answer, and `72</answer>` would be read as an inequality.
    final = answer_of(completion.rpartition("</think>")[2])
    marked_gold = "####" in gold
    gold_parsed = _parse_gold(gold.rpartition("####")[2].strip() if marked_gold else gold, timeout_s)
    if not gold_parsed:
        return None
    marks = _MARKED.findall(final) if marked_gold else []
    answer = _parse_number(marks[-1], timeout_s) if marks else _parse_answer(final, timeout_s)
    return float(verify(list(gold_parsed), list(answer), timeout_seconds=timeout_s))


@lru_cache(maxsize=4096)
def _parse_gold(text: str, timeout_s: int) -> tuple[Any, ...]:
    """Cached: the G samples of a group share their gold."""
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=timeout_s))


@lru_cache(maxsize=4096)
def _parse_number(text: str, timeout_s: int) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=timeout_s))


def _parse_answer(text: str, timeout_s: int) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    latex = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    extraction = [latex, ExprExtractionConfig()]
    return tuple(parse(text, extraction_config=extraction, extraction_mode="first_match", parsing_timeout=timeout_s))
