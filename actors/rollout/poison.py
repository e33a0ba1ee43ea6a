"""Poisoned prompts: those that kill rollout engines.

A prompt that kills engines would kill all of them. So what an engine worked on when it died (unless its whole node did) is
retried on other engines; what was part of SHARED_DEATHS deaths, or of one as the only prompt of its engine, alone on one. A
prompt is poisoned, and all its samples fail, when POISONED_DEATHS engines died that worked on nothing else. Deaths among others,
however many, only make it suspect: an innocent prompt with long completions sees many, where machines fail or another prompt is
poisoned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

SHARED_DEATHS = 2
POISONED_DEATHS = 2


class Suspect(Protocol):
    """A sample, as far as it can be blamed for the death of engines."""

    deaths: int
    """The number of engines that died while they worked on the sample."""
    lone_deaths: int
    """The number of those engines that worked on nothing else but its prompt."""

    @property
    def prompt_id(self) -> str: ...


def is_suspect(sample: Suspect) -> bool:
    """Whether the sample's prompt may kill engines; such a sample is tried alone on one."""
    return sample.deaths >= SHARED_DEATHS or sample.lone_deaths > 0


def blame(work: Sequence[Suspect]) -> bool:
    """Count the death of an engine that worked on these samples, and return whether their prompt is poisoned."""
    alone = len({sample.prompt_id for sample in work}) == 1
    for sample in work:
        sample.deaths += 1
        sample.lone_deaths += alone
    return max(sample.lone_deaths for sample in work) >= POISONED_DEATHS


def verdict(work: Sequence[Suspect], engine: str, reason: str) -> str:
    """The error of the poisoned prompt that `work` belongs to; `engine` is the last that died, of `reason`."""
    return (
        f"prompt {work[0].prompt_id} ends rollout engines: {max(s.deaths for s in work)} died while they worked on it, "
        f"{POISONED_DEATHS} of them on nothing else, the last one {engine} ({reason}); look at this prompt, and at "
        f"logs/{engine}.log"
    )
