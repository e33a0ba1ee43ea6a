"""Metrics of episodes: their turns, their tools, and their environments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from grpo_ray.types import Group


def episode_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """The metrics of a step's episodes; none where a prompt has one answer."""
    infos = [info for group in groups for info in group.samples]
    episodes = [info.episode for info in infos if info.episode is not None]
    if not episodes:
        return {}
    calls: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for episode in episodes:
        calls.update(dict(episode.calls))
        failed.update(episode.failures)
    ends = Counter(info.finish_reason for info in infos)
    return {
        "environment/turns": sum(e.num_turns for e in episodes) / len(episodes),
        "environment/tool_calls": calls.total() / len(episodes),
        **{f"environment/tool_calls/{name}": number / len(episodes) for name, number in calls.items()},
        "environment/errors": float(sum(e.num_errors for e in episodes)),
        "environment/seconds": sum(e.seconds for e in episodes) / len(episodes),
        "environment/tokens": sum(i.num_environment_tokens for i in infos) / len(episodes),
        "environment/failed": float(failed.total()),
        **{f"environment/failed/{status}": float(number) for status, number in failed.items()},
        **{f"environment/ended/{reason}": number / len(episodes) for reason, number in ends.items()},
    }
