"""The schema of what every training run has, whether it learns from rewards or from examples."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from grpo_ray.config.base import HomePath, PositiveInt, Strict
from grpo_ray.config.data import DataConfig
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.model import ModelConfig
from grpo_ray.config.runtime import CheckpointConfig, ClusterConfig, DeadlineConfig, TrackingConfig

Epochs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A number of epochs; a fraction is rounded up to whole rows."""

KEY_ORDER = (
    "name",
    "dir",
    "code_dir",
    "seed",
    "num_steps",
    "num_epochs",
    "prompts_per_step",
    "examples_per_step",
    "max_length",
    "model",
    "data",
    "rollout",
    "environment",
    "reward",
    "algorithm",
    "learner",
    "critic",
    "weights",
    "deadlines",
    "checkpoint",
    "eval",
    "sample",
    "tracking",
    "cluster",
    "dpo",
    "reward_model",
)
"""The order of a recipe's keys when printed: a run's own keys stand among those that all runs share."""


class CommonConfig(Strict):
    name: str | None = None
    """The run's folder under `dir`. None: the recipe's name and the time."""
    dir: HomePath = "runs"
    code_dir: HomePath | None = None
    """The folder, besides the current one, in which modules of rewards and `python:` data are searched. A run records the folder
    that it was started in, so that it can be resumed from any other."""
    seed: int = 1
    num_steps: PositiveInt | None = None
    num_epochs: Epochs = 1.0
    """The number of epochs if num_steps is not given; see data.last_batch."""

    model: ModelConfig
    data: DataConfig
    learner: LearnerConfig = LearnerConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()


def keys_in_order(schema: type[BaseModel]) -> list[str]:
    """The names of a section's options, in the order in which they are printed."""
    if not issubclass(schema, CommonConfig):
        return list(schema.model_fields)
    return sorted(schema.model_fields, key=KEY_ORDER.index)
