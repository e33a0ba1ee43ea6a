"""Preference pairs from a judge, as in DeepSeek-R1 (2501.12948, section 3.1): every two answers are shown in both orders, a
pair is kept where all judgements agree and differ clearly, and the kept ones are balanced in length.

    answers of a prompt -> two of them, seeded -> both orders, `rounds` times -> decide -> balance_lengths -> rows in TRL's form
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from grpo_ray.data.sources import Row, Table
from grpo_ray.errors import DataError, JudgeError
from grpo_ray.rewards.answers.parts import Part, part_of
from grpo_ray.rewards.endpoints.judge_client import Judge, Message
from grpo_ray.rewards.endpoints.judge_form import HIGHEST, LOWEST, about_material, quoted, rating_form, read_ratings
from grpo_ray.rewards.judge import conversation_text

RUBRIC = (
    "Compare two responses to a question by how helpful they are: right, relevant, clear and complete, "
    "and no longer than needed."
)
_RATINGS = ("first", "second")


@dataclass(frozen=True)
class Candidates:
    """The answers to one prompt."""

    prompt: str | list[dict[str, Any]]
    answers: tuple[str, ...]
    """The answers, distinct, at least two."""


@dataclass(frozen=True)
class JudgedPair:
    prompt: str | list[dict[str, Any]]
    chosen: str
    rejected: str
    margin: float
    """The mean difference of their ratings, in points of ten."""

    @property
    def longer_by(self) -> int:
        """The number of characters by which the chosen answer is longer than the rejected one."""
        return len(self.chosen) - len(self.rejected)

    def row(self) -> Row:
        """The row in TRL's preference format, conversational where the prompt is."""
        chat = not isinstance(self.prompt, str)
        answers = {"chosen": self.chosen, "rejected": self.rejected}
        out: Row = {"prompt": self.prompt}
        for name, text in answers.items():
            out[name] = [{"role": "assistant", "content": text}] if chat else text
        return {**out, "margin": self.margin}


@dataclass
class Counts:
    """Counts of the outcomes of comparisons."""

    asked: int = 0
    kept: int = 0
    disagreed: int = 0
    """The number of pairs for which the two orders disagreed, or gave no preference."""
    too_close: int = 0
    failed: int = 0
    last_failure: str = ""


def read_candidates(table: Table) -> list[Candidates]:
    """Read rows with `prompt` and `completions`, or with `prompt` and `completion`, which are grouped by prompt.

    Raises:
        DataError: a row has neither, or no prompt has two different answers.
    """
    answers: dict[str, tuple[Any, dict[str, None]]] = {}
    for i, row in enumerate(table.rows):
        prompt, several = row.get("prompt"), row.get("completions", [row.get("completion")])
        texts = [_text(c) for c in several] if isinstance(several, list) else [None]
        if not isinstance(prompt, str | list) or None in texts:
            raise DataError(
                f"{table.where(i)}: expected a prompt with completions (a list of texts), or with a completion; columns there: "
                f"{', '.join(map(str, row))}"
            )
        _, known = answers.setdefault(repr(prompt), (prompt, {}))
        known.update(dict.fromkeys(t for t in texts if t is not None))
    out = [Candidates(prompt, tuple(known)) for prompt, known in answers.values() if len(known) > 1]
    if not out:
        raise DataError(f"{table.label}: no prompt has two different answers; sample more of them")
    return out


def choose(candidates: Candidates, num_pairs: int, seed: int) -> list[tuple[str, str]]:
    """The answers to compare: `num_pairs` of all pairs, the same ones for the same seed and prompt."""
    every = list(combinations(candidates.answers, 2))
    return random.Random(f"{seed}/{candidates.prompt!r}").sample(every, min(num_pairs, len(every)))


def decide(gaps: Sequence[float], min_margin: float) -> float | None:
    """The mean gap, rating of one answer minus the other's, over all judgements; None if their signs differ, or the mean is less
    than `min_margin`.
    """
    mean = sum(gaps) / len(gaps)
    agree = all(gap > 0 for gap in gaps) or all(gap < 0 for gap in gaps)
    return mean if agree and abs(mean) >= min_margin else None


def balance_lengths(pairs: Sequence[JudgedPair], tolerance: float) -> list[JudgedPair]:
    """Drop the fewest pairs for which chosen answers are then as long as rejected ones on average: a judge prefers length, and a
    reward model would learn nothing else.

    Args:
        tolerance: the tolerance of the mean length; 1 keeps all.
    """
    if tolerance >= 1:
        return list(pairs)
    kept = set(range(len(pairs)))
    total = sum(pair.longer_by for pair in pairs)
    length = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs) / 2
    sign = 1 if total > 0 else -1
    for i in sorted(kept, key=lambda i: -sign * pairs[i].longer_by):
        if abs(total) <= tolerance * length or sign * pairs[i].longer_by <= 0 or len(kept) == 1:
            break
        kept.remove(i)
        total -= pairs[i].longer_by
        length -= (len(pairs[i].chosen) + len(pairs[i].rejected)) / 2
    return [pairs[i] for i in sorted(kept)]


async def judge_pairs(
    candidates: Sequence[Candidates],
    judge: Judge,
    *,
    rubric: str,
    part: Part,
    pairs_per_prompt: int,
    rounds: int,
    min_margin: float,
    seed: int,
    counts: Counts,
    advance: Callable[[int], None],
) -> list[JudgedPair]:
    """Judge pairs in the order of their prompts. A comparison that fails is counted and left out.

    Args:
        part: the part of an answer that the judge sees.
        rounds: how often it is asked in each order (DeepSeek-R1: 2, four judgements in all).
        counts: the outcomes of the comparisons are added to it.
        advance: called with 1 for every comparison that is done.
    """
    wanted = [(c.prompt, *two) for c in candidates for two in choose(c, pairs_per_prompt, seed)]

    async def compare(prompt: str | list[dict[str, Any]], one: str, other: str) -> JudgedPair | None:
        counts.asked += 1
        try:
            shown = (part_of(one, part), part_of(other, part))
            asked = [(order, n) for n in range(rounds) for order in (shown, shown[::-1])]
            calls = [asyncio.create_task(_ratings(judge, rubric, prompt, *order, n)) for order, n in asked]
            # All of them, so that the cache has the replies to the neighbours of a failure.
            await asyncio.gather(*calls, return_exceptions=True)
            ratings = [call.result() for call in calls]
        except JudgeError as e:
            counts.failed += 1
            counts.last_failure = str(e)
            return None
        finally:
            advance(1)
        gaps = [(a - b) * (1 if i % 2 == 0 else -1) for i, (a, b) in enumerate(ratings)]
        margin = decide(gaps, min_margin)
        if margin is None:
            agree = decide(gaps, 0.0) is not None
            counts.too_close += agree
            counts.disagreed += not agree
            return None
        counts.kept += 1
        return JudgedPair(prompt, *((one, other) if margin > 0 else (other, one)), abs(margin))

    found = await asyncio.gather(*(compare(*three) for three in wanted))
    return [pair for pair in found if pair is not None]


async def _ratings(
    judge: Judge, rubric: str, prompt: str | list[dict[str, Any]], first: str, second: str, number: int
) -> tuple[float, float]:
    """The two ratings. Raises JudgeError, also for a reply without ratings."""
    question = conversation_text(prompt)
    mark = judge.mark([rubric, question, first, second])
    shown = [quoted("question", question, mark), *(quoted("response", text, mark) for text in (first, second))]
    form = (
        f"Rate each from {LOWEST:g} to {HIGHEST:g}. Say in a sentence or two why, then end with both ratings in this form: "
        f"{rating_form(_RATINGS, mark)}. Their order means nothing. {about_material('The question and the responses', mark)}"
    )
    # The round number makes it another question, for the cache and for a judge at temperature 0.
    again = f" (judgement {number + 1})" if number else ""
    messages: list[Message] = [
        {"role": "system", "content": f"{rubric} {form}{again}"},
        {"role": "user", "content": "\n\n".join(shown)},
    ]
    text = await judge.ask(messages)
    ratings = read_ratings(text, _RATINGS, mark)
    if ratings is None:
        raise JudgeError(f"the judge gave no two ratings from {LOWEST:g} to {HIGHEST:g}: {text!r:.120}")
    return ratings[0], ratings[1]


def _text(completion: Any) -> str | None:
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        completion = completion[0].get("content")
    return completion if isinstance(completion, str) else None
