"""Is the mathematical answer right?"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answer_tag import answer_of
from grpo_ray.rewards.function import Completions, text_of

# The whole rest of the line has to be a number: `#### Step 3` is a heading of a chatty model, not an answer.
_NUMBER = r"\$?[-+]?\$?\d[\d,]*(?:\.\d+)?%?"
_MARKED = re.compile(rf"####[ \t]*({_NUMBER})[ \t]*\.?[ \t]*$", re.MULTILINE)
_PLAIN = re.compile(_NUMBER)
_IN_DOLLARS = re.compile(r"\$([^$]+)\$")
_LATEX_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mbox|begin|end|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2}")
MAX_FORMULA_CHARS = 300


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
    stops at LaTeX.) A gold or an `<answer>` that is nothing but a formula needs no `$` and no box: MATH's column
    `answer` holds `6 - 5i` and `\frac12`.

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

    marked = "####" in gold
    gold_parsed = _parse_gold(gold.rpartition("####")[2].strip() if marked else gold, timeout_s)
    if not gold_parsed:
        return None
    answer = extract(completion, marked, timeout_s)
    return float(verify(list(gold_parsed), list(answer), timeout_seconds=timeout_s))


def extract(completion: str, marked: bool, timeout_s: int) -> tuple[Any, ...]:
    """What math-verify reads as the completion's answer, its text last; nothing if there is none.

    Args:
        marked: the gold answer has the form `#### 42`, so that such a line is looked for first.
    """
    # A number in the reasoning is not an answer, and `72</answer>` would be read as an inequality.
    final = answer_of(completion.rpartition("</think>")[2])
    marks = _MARKED.findall(final) if marked else []
    return _parse_number(marks[-1], timeout_s) if marks else _parse_answer(_boxed_formula(final) or final, timeout_s)


@lru_cache(maxsize=4096)
def _parse_gold(text: str, timeout_s: int) -> tuple[Any, ...]:
    """Cached: the G samples of a group share their gold."""
    from math_verify import parse

    boxed = _boxed_formula(text)
    found = _parse_answer(boxed, timeout_s) if boxed else ()
    return found or tuple(parse(text, parsing_timeout=timeout_s))


@lru_cache(maxsize=4096)
def _parse_number(text: str, timeout_s: int) -> tuple[Any, ...]:
    from math_verify import parse

    return tuple(parse(text, parsing_timeout=timeout_s))


def _boxed_formula(text: str) -> str | None:
    """The text in a box if it is one formula and nothing else, with or without `$`; None for prose and plain numbers.

    Without the box math-verify passes over it, or takes its last number for the whole.
    """
    in_dollars = _IN_DOLLARS.fullmatch(text.strip())
    formula = in_dollars[1].strip() if in_dollars else text.strip()
    if not formula or len(formula) > MAX_FORMULA_CHARS or "\n" in formula or _PLAIN.fullmatch(formula):
        return None
    if any(mark in formula.replace("\\$", "") for mark in ("$", "\\boxed", "\\(", "\\[", "####")):
        return None
    return None if _WORD.search(_LATEX_WORDS.sub(" ", formula)) else f"\\boxed{{{formula}}}"


def _parse_answer(text: str, timeout_s: int) -> tuple[Any, ...]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    from math_verify.parser import NormalizationConfig

    latex = LatexExtractionConfig(
        # `malformed_operators` is what reads `\frac12`, which is good TeX and frequent in MATH.
        normalization_config=NormalizationConfig(units=True, malformed_operators=True),
        boxed_match_priority=0,
        try_extract_without_anchor=False,
    )
    extraction = [latex, ExprExtractionConfig()]
    return tuple(parse(text, extraction_config=extraction, extraction_mode="first_match", parsing_timeout=timeout_s))
