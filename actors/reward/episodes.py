"""What samples of several turns bring along: rewards that were computed where their environments lived, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grpo_ray.rewards.functions.function import Conversation
from grpo_ray.rewards.functions.scoring import weighted_sum
from grpo_ray.types import Episode, RewardScore, Sample, Score


def episode_of(sample: Any) -> Episode | None:
    """The sample's episode; None: it has one turn."""
    return sample.episode if isinstance(sample, Sample) else None


def failed_score(sample: Any) -> Score | None:
    """The score of a sample whose environment failed; None: it did not."""
    episode = episode_of(sample)
    if episode is None or episode.failure is None:
        return None
    failure = episode.failure
    return Score(failure.status, math.nan, (failure,), failure.detail)


def brought(sample: Any) -> dict[str, RewardScore]:
    """The rewards that the sample brings along, by name."""
    episode = episode_of(sample)
    return {} if episode is None else {score.name: score for score in episode.scores}


def with_brought(
    names: Sequence[str], weights: Sequence[float], computed: dict[str, RewardScore], sample: Any, num_tokens: int
) -> Score:
    """The score of a sample by functions of these names and weights, and by its environment with weight 1.

    Args:
        computed: the scores of the functions that were called here.
    """
    known = {**brought(sample), **computed}
    own = [name for name in known if name not in names]
    return weighted_sum([known[name] for name in [*names, *own]], [*weights, *(1.0 for _ in own)], num_tokens)


def completion_of(episode: Episode, *, last_answer: bool) -> Conversation:
    """What reward functions see of an episode: all messages after the prompt, as in TRL.

    Args:
        last_answer: the model's last turn alone, for built-ins, which judge an answer.
    """
    if not last_answer:
        return [dict(message) for message in episode.messages]
    answers = [m for m in episode.messages if m["role"] == "assistant"]
    return [{"role": "assistant", "content": str(answers[-1]["content"]) if answers else ""}]
