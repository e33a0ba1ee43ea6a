"""Tasks of reasoning-gym, scored by the task's own verifier."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answer_tag import answer_of
from grpo_ray.rewards.function import Completions, text_of


def reasoning_gym(
    completions: Completions,
    reasoning_gym_entry: list[dict[str, Any] | None],
    reasoning_gym_task: list[str],
    strict: bool = False,
) -> list[float | None]:
    """What `score_answer` of the row's task gives the answer (in `<answer>`, else the whole completion).

    `reasoning_gym_entry` is the generator's row (question, answer, metadata), `reasoning_gym_task` the task's name; it does
    not apply to a row without an entry.
    Most tasks give partial credit, some even to an empty answer; `strict` counts a full 1 only.

    Range [0, 1]; strict: {0, 1}. Source: reasoning-gym 0.1.25.

    Raises:
        RewardError: no such task.
    """
    rows = zip(completions, reasoning_gym_entry, reasoning_gym_task, strict=True)
    scores = [
        None if entry is None else float(_verifier(task)(answer_of(text_of(c)), entry)) for c, entry, task in rows
    ]
    return [None if score is None else float(score >= 1.0) for score in scores] if strict else scores


@lru_cache(maxsize=256)
def _verifier(task: str) -> Any:
    import reasoning_gym as library

    try:
        return library.get_score_answer_fn(task)
    except ValueError as e:
        raise RewardError(
            f"reward 'reasoning_gym': no task {task!r} in reasoning-gym ({e}); see column reasoning_gym_task"
        ) from None
