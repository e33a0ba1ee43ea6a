"""The reward of reasoning-gym's tasks, scored by each task's own verifier in a sandbox."""

from __future__ import annotations

import asyncio
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.rewards.answers.answer_tag import answer_of
from grpo_ray.rewards.functions.function import Completions, Explained, text_of
from grpo_ray.sandbox.isolation import Languages
from grpo_ray.sandbox.trial import check_isolation
from grpo_ray.sandbox.verifier import Ended, Verifier, library_folders, sendable

LIBRARIES = ("reasoning_gym", "sympy")
PROGRAM = Path(__file__).with_name("reasoning_gym_verifier.py")


def reasoning_gym(
    completions: Completions,
    reasoning_gym_entry: list[dict[str, Any] | None],
    reasoning_gym_task: list[str],
    strict: bool = False,
) -> list[float | RewardError | None]:
    """The score that `score_answer` of the row's task gives the answer (in `<answer>`, else the whole completion).

    `reasoning_gym_entry` is the generator's row (question, answer, metadata), `reasoning_gym_task` the task's name; it does
    not apply to a row without an entry.
    Most tasks give partial credit, some even to an empty answer; `strict` counts a full 1 only.

    The verifiers run in a sandbox, where none of them evaluates more than literals, arithmetic and SymPy's functions. An answer
    at which one fails, or computes forever, scores 0.

    Range [0, 1]; strict: {0, 1}. Source: reasoning-gym 0.1.25.

    Raises:
        RewardError: no sandbox can be started. In place of a number: there is no such task, or its row can't be scored.
    """
    rows = zip(completions, reasoning_gym_entry, reasoning_gym_task, strict=True)
    items = [None if entry is None else _item(task, answer_of(text_of(c)), entry) for c, entry, task in rows]
    replies = iter(verifier()([item for item in items if isinstance(item, tuple)]))
    scores = [_value(next(replies), item[0]) if isinstance(item, tuple) else item for item in items]
    return [_strict(score) for score in scores] if strict else scores


def check_reasoning_gym(_args: dict[str, Any]) -> None:
    """Check, before a run, that its verifiers can be isolated here.

    Raises:
        RewardError: something is missing; names it.
    """
    if importlib.util.find_spec(LIBRARIES[0]) is None:
        raise RewardError(f"reward 'reasoning_gym' needs the package {LIBRARIES[0]}, which is not installed")
    try:
        asyncio.run(check_isolation(Languages(python_path=library_folders(*LIBRARIES))))
    except RewardError as e:
        raise RewardError(f"reward 'reasoning_gym': its verifiers evaluate what a model wrote: {e}") from None


def load_verifier(_args: dict[str, Any]) -> None:
    """Start the sandbox, whose imports take seconds, before a sample's deadline runs."""
    verifier().start()


@lru_cache(maxsize=1)
def verifier() -> Verifier:
    """The one verifier of the process."""
    return Verifier(PROGRAM.read_text(), LIBRARIES)


def _item(task: Any, answer: str, entry: Any) -> tuple[str, str, Any] | RewardError:
    try:
        return str(task), answer, sendable(entry)
    except RewardError as e:
        return RewardError(f"reward 'reasoning_gym': {e}; see column reasoning_gym_entry")


def _value(reply: Any, task: str) -> float | RewardError:
    match reply:
        case Ended():
            return Explained(0.0, f"the verifier ended at this answer: {reply.how}")
        case ["score", int() | float() as score] if 0 <= score <= 1:
            return float(score)
        case ["score", score]:
            return RewardError(f"reward 'reasoning_gym': task {task!r} gave {score}, expected a number from 0 to 1")
        case ["answer", why]:
            return Explained(0.0, f"the verifier failed at this answer: {why}")
        case ["task", why]:
            return RewardError(
                f"reward 'reasoning_gym': no task {task!r} in reasoning-gym ({why}); see column reasoning_gym_task"
            )
        case _:
            return RewardError(
                f"reward 'reasoning_gym': task {task!r} can't score this row ({reply!r:.200}); see column reasoning_gym_entry"
            )


def _strict(score: float | RewardError | None) -> float | RewardError | None:
    return float(score >= 1.0) if isinstance(score, float) else score
