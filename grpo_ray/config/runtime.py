"""The schema of what a run stands on, whatever it trains: `deadlines`, `checkpoint`, `tracking` and `cluster`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from grpo_ray.config.base import HomePath, NonNegFloat, PositiveFloat, PositiveInt, Strict


class DeadlineConfig(Strict):
    """Nothing waits without one. Each error names what was waited for."""

    resources_s: PositiveFloat = 30.0
    """Cluster resources for the actors."""
    start_s: PositiveFloat = 600.0
    """Engine or learner start, model loading included. One that starts again and takes far longer than the first is begun anew."""
    sample_s: PositiveFloat = 1800.0
    """One sample."""
    update_s: PositiveFloat = 3600.0
    """One learner step."""
    sync_s: PositiveFloat = 300.0
    """One weight transfer."""
    save_s: PositiveFloat = 1800.0
    """One checkpoint."""
    store_s: PositiveFloat = 1800.0
    """An object store of checkpoint.path that does not answer. Training goes on meanwhile, and each checkpoint stays in the run's
    folder until it is there; then the run ends, with the newest of them to resume from. What can't go on without the store, a
    start or a `resume`, waits for a minute at most."""


class CheckpointConfig(Strict):
    path: HomePath | None = None
    """A folder or an fsspec URL (`s3://bucket/runs`) that gets a folder for each run. None: `checkpoints/` of the run."""
    every_steps: PositiveInt = 50
    """And at the beginning and the end; the next one waits until the last is written."""
    every_minutes: NonNegFloat = 15.0
    """Also after the step at whose end so long has passed since the last. 0: never."""
    keep: PositiveInt = 2
    """The newest ones; that of the beginning is one like the others."""
    export: bool = True
    """Each checkpoint also holds the policy as a Hugging Face model (`hf/`)."""

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
    """Give the figures of each step to Ray's metrics, which its nodes serve to Prometheus."""
    project: str = "grpo-ray"
    rollouts: bool = True
    """Write every sample to rollouts/*.parquet."""
    trace: bool = True
    """Write what every worker did to trace.json (at most 64 MiB, the newest steps), for ui.perfetto.dev and the report."""


class ClusterConfig(Strict):
    address: str | None = None
    """A running Ray cluster (`auto`, or host:port). None: start one on this machine."""
    num_cpus: PositiveInt | None = None
    """CPUs that a cluster started here counts. None: those that this process may use, by a container's quota too."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """disaggregated: samplers and learners have devices of their own, and work at the same time. colocated: they take turns on the
    same ones (verl's hybrid engine, TRL's vllm_mode colocate); each GPU holds an engine and a learner, weights go by CUDA IPC. On
    CPUs each kind has all cores in its turn."""
