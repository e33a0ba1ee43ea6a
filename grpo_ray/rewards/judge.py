"""The reward by another model's rating of an answer, if there is no rule."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any

from grpo_ray.errors import JudgeError, RewardError
from grpo_ray.rewards.endpoints.judge_client import Judge, JudgeOptions, Message
from grpo_ray.rewards.endpoints.judge_form import (
    HIGHEST,
    LOWEST,
    about_material,
    quoted,
    rating_form,
    read_ratings,
    without_mark,
)
from grpo_ray.rewards.functions.function import Completions, Conversation, Explained, text_of

RUBRIC = "Judge how well the response answers the question: whether it is right, relevant, clear and complete."
_SCORE = ("score",)


async def judge(
    prompts: Completions,
    completions: Completions,
    answer: list[Any] | None = None,
    *,
    model: str,
    base_url: str = JudgeOptions.base_url,
    rubric: str = RUBRIC,
    use_answer: bool = False,
    tries: int = 2,
    temperature: float = JudgeOptions.temperature,
    max_tokens: int = JudgeOptions.max_tokens,
    deadline_s: float = JudgeOptions.deadline_s,
    retries: int = JudgeOptions.retries,
    concurrency: int = JudgeOptions.concurrency,
    requests_per_minute: float | None = None,
    cache: str | None = None,
) -> list[Explained | RewardError]:
    """The judge's rating by the rubric, from 1 to 10, scaled to [0, 1]; its reasons are the detail.

    `model` and `base_url` are those of any OpenAI-compatible endpoint, its key is OPENAI_API_KEY (`reward.env`). `use_answer`: the
    judge sees the row's column `answer`. Without a rating it is asked again, up to `tries` times in total. `cache` is a file of
    answers, `requests_per_minute` limits one scoring process: use `workers: {num_actors: 1}`. A sample whose judgement can't
    be obtained fails alone. See `grpo_ray.rewards.endpoints.judge_client.JudgeOptions`.

    Range [0, 1]. Source: DeepSeek-R1's use of DeepSeek-V3 as a judge (2501.12948, section 2.3.3); the form is ours.

    Raises:
        RewardError: the cache can't be opened, or there is no column `answer` to use.
    """
    if use_answer and answer is None:
        raise RewardError(
            "reward 'judge': use_answer needs a column 'answer'; map one: data.train.columns: {answer: NAME}"
        )
    options = JudgeOptions(
        model, base_url, temperature, max_tokens, deadline_s, retries, concurrency, requests_per_minute, cache
    )
    asked = _judge(options)
    references = answer if use_answer and answer is not None else [None] * len(completions)
    rows = zip(prompts, completions, references, strict=True)
    questions = [_parts(prompt, text_of(c), reference) for prompt, c, reference in rows]
    return list(await asyncio.gather(*(_rate(asked, rubric, q, tries) for q in questions)))


@lru_cache(maxsize=8)
def _judge(options: JudgeOptions) -> Judge:
    """The one judge of the process, which has one event loop as well."""
    return Judge(options)


async def _rate(judge: Judge, rubric: str, parts: dict[str, str], tries: int) -> Explained | RewardError:
    mark = judge.mark([rubric, *parts.values()])
    messages = _question(rubric, parts, mark)
    again = f"Your answer holds no rating. End with the rating alone, in this form: {rating_form(_SCORE, mark)}"
    try:
        for _ in range(tries):
            text = await judge.ask(messages)
            if (ratings := read_ratings(text, _SCORE, mark)) is not None:
                return Explained((ratings[0] - LOWEST) / (HIGHEST - LOWEST), without_mark(text, mark))
            messages = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": again}]
    except JudgeError as e:
        return e
    return JudgeError(
        f"the judge gave no rating from {LOWEST:g} to {HIGHEST:g} in {tries} tries; the last: {text!r:.120}"
    )


def conversation_text(prompt: str | Conversation) -> str:
    """The text of a prompt for a judge: the question alone, or the turns of a conversation."""
    if isinstance(prompt, str):
        return prompt
    turns = [m for m in prompt if m["role"] != "system"]
    return turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)


def _parts(prompt: str | Conversation, completion: str, reference: Any) -> dict[str, str]:
    """Name -> text of the parts that the judge sees."""
    parts = {"question": conversation_text(prompt), "reference": str(reference), "response": completion}
    return {name: text for name, text in parts.items() if name != "reference" or reference is not None}


def _question(rubric: str, parts: dict[str, str], mark: str) -> list[Message]:
    names = " and the ".join(parts)
    form = (
        f"Rate the response from {LOWEST:g} to {HIGHEST:g}. Say in a sentence or two why, then end with the rating in this form: "
        f"{rating_form(_SCORE, mark)}. {about_material(f'The {names}', mark)}"
    )
    shown = "\n\n".join(quoted(name, text, mark) for name, text in parts.items())
    return [{"role": "system", "content": f"{rubric} {form}"}, {"role": "user", "content": shown}]
