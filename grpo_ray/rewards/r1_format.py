"""R1-Zero's form: reasoning, then the answer, and nothing else."""

from __future__ import annotations

import re

from grpo_ray.rewards.function import Completions, text_of
from grpo_ray.thinking import OPEN, begun

_R1 = re.compile(r"\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")


def r1_format(completions: Completions, prefilled: bool = False) -> list[float]:
    """1 if the whole completion is `<think>...</think>`, then `<answer>...</answer>`, each tag once, else 0.

    Range {0, 1}. `prefilled`: the completion starts behind a `<think>`. A prompt that ends in one is seen by itself; this is for
    others.
    Source: DeepSeek-R1-Zero's format reward (2501.12948, section 2.2.2 and its Table 1).
    """
    texts = [text_of(c) for c in completions]
    return [float(match_r1(begun(t) if prefilled and not t.startswith(OPEN) else t) is not None) for t in texts]


def match_r1(text: str) -> re.Match[str] | None:
    """The groups `think` and `answer` of a text in that form; None for any other."""
    found = _R1.fullmatch(text)
    return found if len(_TAG.findall(text)) == 4 else None
