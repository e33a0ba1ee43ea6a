"""The reward for R1-Zero's format: reasoning, then the answer, and nothing else."""

from __future__ import annotations

import itertools
import re

from grpo_ray.data.thinking import OPEN, begun
from grpo_ray.rewards.functions.function import Completions, text_of

_TAG = re.compile(r"</?(?:think|answer)>")


def r1_format(completions: Completions, prefilled: bool = False) -> list[float]:
    """1 if the whole completion is `<think>...</think>`, then `<answer>...</answer>`, each tag once, else 0.

    Range {0, 1}. `prefilled`: the completion starts after a `<think>`. A prompt that ends in one is detected; this is for
    others.
    Source: DeepSeek-R1-Zero's format reward (2501.12948, section 2.2.2 and its Table 1).
    """
    texts = [text_of(c) for c in completions]
    return [float(match_r1(begun(t) if prefilled and not t.startswith(OPEN) else t) is not None) for t in texts]


def match_r1(text: str) -> dict[str, str] | None:
    """The content of `think` and `answer` in a text of that format; None for any other."""
    tags = list(itertools.islice(_TAG.finditer(text), 5))
    if [tag[0] for tag in tags] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return None
    ends = [0, *(place for tag in tags for place in tag.span()), len(text)]
    before, think, between, answer, after = (text[ends[i] : ends[i + 1]] for i in range(0, 10, 2))
    return None if (before + between + after).strip() else {"think": think, "answer": answer}
