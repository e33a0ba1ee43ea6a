"""What a worker asks of a process of environments."""

from __future__ import annotations

from dataclasses import dataclass

from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.episodes.calls import ToolCall


@dataclass(frozen=True)
class Setup:
    """The first message: what to import, and the limits."""

    config: EnvironmentConfig
    functions: tuple[RewardFunctionConfig, ...]
    """Reward functions of users; those that name `environments` are called here."""
    search_path: tuple[str, ...]
    """`sys.path` of the parent."""


@dataclass(frozen=True)
class Begin:
    """Begin an episode at a place, in its instance or a new one."""

    place: int
    environment: str
    row: bytes
    """The pickled columns."""
    seed: int


@dataclass(frozen=True)
class Step:
    place: int
    action: str


@dataclass(frozen=True)
class ToolUse:
    place: int
    call: ToolCall


@dataclass(frozen=True)
class End:
    """Compute the rewards of the episode at a place."""

    place: int
    inputs: bytes
    """Pickled ScoreInputs of the one sample."""


@dataclass(frozen=True)
class Describe:
    """Describe every environment; for a process that does nothing else, since it imports Transformers."""


@dataclass(frozen=True)
class Leave:
    """Close every instance and end."""


Request = Begin | Step | ToolUse | End | Describe | Leave
