"""The reward for reasoning between think tags."""

from __future__ import annotations

import re

from grpo_ray.rewards.functions.function import Completions, text_of

_THINK = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)


def think_format(completions: Completions) -> list[float]:
    """1 if the completion starts with `<think>`, opens it once and closes it, else 0.

    Range {0, 1}. Source: TRL `think_format_reward`, the same expression.
    """
    return [float(_THINK.match(text_of(c)) is not None) for c in completions]
