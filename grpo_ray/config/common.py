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
"""Parts of one are rounded up to whole rows."""

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
"""Of a recipe as it is printed: a run's own keys stand among those that all runs share."""


class CommonConfig(Strict):
    name: str | None = None
    """Folder of the run under `dir`. None: the recipe's name and the time."""
    dir: HomePath = "runs"
    code_dir: HomePath | None = None
    """Folder in which modules of rewards and `python:` data are looked for besides the current one. A run writes down the one that
    it was begun in, so that it can be resumed from any."""
    seed: int = 1
    num_steps: PositiveInt | None = None
    num_epochs: Epochs = 1.0
    """Used when num_steps is not given; see data.last_batch."""

    model: ModelConfig
    data: DataConfig
    learner: LearnerConfig = LearnerConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()


def keys_in_order(schema: type[BaseModel]) -> list[str]:
    """Names of a section's options, in the order in which they are printed."""
    if not issubclass(schema, CommonConfig):
        return list(schema.model_fields)
    return sorted(schema.model_fields, key=KEY_ORDER.index)
