"""The schema of what every training run has, whether it learns from rewards or from examples: `deadlines`, `checkpoint`, `tracking`
and `cluster` among it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from grpo_ray.config.base import HomePath, NonNegFloat, PositiveFloat, PositiveInt, Strict
from grpo_ray.config.data import DataConfig
from grpo_ray.config.learner import LearnerConfig
from grpo_ray.config.model import ModelConfig

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


class DeadlineConfig(Strict):
    """Deadlines of everything that a run waits for. Each error names what was waited for."""

    resources_s: PositiveFloat = 30.0
    """The deadline for cluster resources for the actors."""
    start_s: PositiveFloat = 600.0
    """The deadline for the start of a rollout engine or learner rank, model loading included. A restart that takes far longer than
    the first start is started over."""
    sample_s: PositiveFloat = 1800.0
    """The deadline for one sample."""
    update_s: PositiveFloat = 3600.0
    """The deadline for one learner step."""
    sync_s: PositiveFloat | None = None
    """The deadline for one weight sync. None: 60 on a cluster with GPUs, 300 elsewhere."""
    save_s: PositiveFloat = 1800.0
    """The deadline for one checkpoint."""
    store_s: PositiveFloat = 1800.0
    """How long the object store of checkpoint.path may fail to respond. Training continues meanwhile, and each checkpoint stays in
    the run's folder until it is uploaded; then the run ends, with the newest checkpoint to resume from. What can't continue without
    the store, a start or a `resume`, waits for a minute at most."""

    def of_sync(self, *, has_gpus: bool) -> float:
        """The deadline for one weight sync on a cluster with GPUs, or without."""
        return self.sync_s or (60.0 if has_gpus else 300.0)


class CheckpointConfig(Strict):
    path: HomePath | None = None
    """A folder or an fsspec URL (`s3://bucket/runs`) that gets a folder for each run. None: `checkpoints/` of the run."""
    every_steps: PositiveInt = 50
    """The steps between checkpoints, besides those at the beginning and the end; the next one waits until the last is written."""
    every_minutes: NonNegFloat = 15.0
    """The number of minutes since the last checkpoint after which a finished step saves one too. 0: never."""
    keep: PositiveInt = 2
    """The number of newest checkpoints to keep; the first one counts like the others."""
    export: bool = True
    """Whether each checkpoint also holds the policy as a Hugging Face model (`hf/`)."""

    @model_validator(mode="after")
    def _one_for_all(self) -> Self:
        if self.path is not None and self.path.startswith("memory:"):
            raise ValueError(
                f"checkpoint.path {self.path}: every worker has a memory of its own, which ends with it; use a store that all of "
                "them reach"
            )
        return self


class TrackingConfig(Strict):
    tensorboard: bool = True
    wandb: bool = False
    mlflow: bool = False
    prometheus: bool = True
    """Whether the metrics of each step go to Ray's metrics, which its nodes serve to Prometheus."""
    project: str = "grpo-ray"
    rollouts: bool = True
    """Whether every sample is written to rollouts/*.parquet."""
    trace: bool = True
    """Whether each worker's activity is written to trace.json (at most 64 MiB, newest steps), for ui.perfetto.dev and the
    report."""


class ClusterConfig(Strict):
    address: str | None = None
    """The address of a running Ray cluster (`auto`, or host:port). None: start one on this machine."""
    num_cpus: PositiveInt | None = None
    """The number of CPUs of a cluster started here. None: those that this process may use, limited by a container's quota too."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """disaggregated: rollout engines and learner ranks have devices of their own, and run at the same time. colocated: they take
    turns on the same ones (verl's hybrid engine, TRL's vllm_mode colocate); each GPU holds an engine and a rank, and weights go by
    CUDA IPC. On CPUs each role in turn has all cores."""


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
