"""Measures of a model over several samples of each prompt: pass@1, pass@k and cons@k, each with its standard error.

P prompts, n samples of each, c of them right. Every measure is a mean over prompts, so its standard error is that of the
P values: the n samples of one prompt are not independent of each other and count as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grpo_ray.config.schema import RunConfig
from grpo_ray.types import SampleInfo, Score


@dataclass(frozen=True)
class Estimate:
    mean: float
    standard_error: float
    """The standard error of the mean over prompts; 0 for a single prompt, where it cannot be known."""


def estimate(values_P: Sequence[float]) -> Estimate:
    """Mean over prompts, with the standard deviation over them (n - 1) / sqrt(P)."""
    count = len(values_P)
    mean = math.fsum(values_P) / count
    variance = math.fsum((v - mean) ** 2 for v in values_P) / max(1, count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """The probability that k of the n samples, drawn without replacement, contain a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for every k <= n (2107.03374, equation 1); k = 1 is the mean.
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def consensus(votes: Sequence[float | None], right: Sequence[bool]) -> float:
    """Whether the answer that most samples give is right, DeepSeek-R1's cons@k (2501.12948).

    Args:
        votes: [n] the answer of each sample as a number, equal for equal answers. None: it gives none, and has no vote.
        right: [n] whether each sample is right.

    Returns:
        1 or 0. A tie counts by the fraction of the tied answers that is right, so that no order decides it; without any
        vote 0.
    """
    camps: dict[float, list[bool]] = {}
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            camps.setdefault(vote, []).append(is_right)
    if not camps:
        return 0.0
    most = max(len(camp) for camp in camps.values())
    winners = [camp for camp in camps.values() if len(camp) == most]
    return sum(sum(camp) / len(camp) for camp in winners) / len(winners)


def pass_ks(num_samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of two, and n itself."""
    return sorted({1 << i for i in range(num_samples.bit_length())} | {num_samples})


@dataclass(frozen=True)
class EvalResult:
    measures: dict[str, Estimate]
    """`pass@1`; with more than one sample also `pass@2`, `pass@4`, .. and, where votes were counted, `cons@k`: each over the
    prompts with so many samples to which the accuracy applies. Empty if it applies to none."""
    num_prompts: int
    num_samples: int
    """The number of samples of each prompt, k."""
    mean_reward: float | None
    """The mean reward of the samples that have one; None if none has."""
    mean_length: float
    """The mean number of completion tokens."""
    num_not_applicable: int = 0
    """The number of samples to which the accuracy does not apply."""
    why_not: str = ""
    """The reason for the first of them."""
    scores: tuple[Score, ...] = ()
    """The scores of all samples."""
    infos: tuple[SampleInfo, ...] = ()
    """The records of all samples, in the same order: prompt by prompt, k of each."""

    @property
    def accuracy(self) -> Estimate | None:
        """The measure pass@1."""
        return self.measures.get("pass@1")

    @property
    def num_measured(self) -> int:
        """The number of samples that the accuracy is measured on."""
        return self.num_prompts * self.num_samples - self.num_not_applicable

    @property
    def warning(self) -> str | None:
        """The warning when there is no accuracy."""
        if self.accuracy is not None:
            return None
        total = self.num_prompts * self.num_samples
        return f"there is no held-out accuracy, for it applies to none of {total} samples: {self.why_not}"


def accuracy_name(config: RunConfig) -> str:
    """The name of the reward function that decides what is right."""
    return config.eval.accuracy or config.reward_titles[0]
