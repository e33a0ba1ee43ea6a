"""The schema of what trains: `learner`, `critic`, and `weights`, which take what was learnt to the samplers."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from grpo_ray.config.base import Env, Labels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt, Resources, Strict
from grpo_ray.config.model import ModelConfig


class LearnerConfig(Strict):
    num_actors: PositiveInt = 1
    num_cpus: NonNegFloat = 1
    num_gpus: NonNegFloat | None = None
    """Per actor. None: 1 on a cluster with GPUs (0.5 when colocated), 0 elsewhere."""
    resources: Resources = {}
    labels: Labels = {}
    sequence_parallel_size: PositiveInt = 1
    """So many learners share each micro-batch, every one with a slice of its tokens: for contexts beyond one GPU (Ulysses; verl's
    ulysses_sequence_parallel_size). Divides num_actors and the model's attention heads."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_params: bool = False
    learning_rate: PositiveFloat = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "constant"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Of cosine_with_min_lr: its end, as a part of the learning rate."""
    warmup_steps: NonNegInt = 0
    weight_decay: NonNegFloat = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 8192
    """Tokens (prompt and completion) of one forward and backward, over all learners that share it."""
    packing: bool = True
    """Sequences end to end. False: filled up to the longest of a micro-batch (same gradient, more work)."""
    share_prompts: bool = True
    """Compute the prompt of a group once for all its sequences in a micro-batch (same gradient, less work). Without effect where
    sequences are padded or shared by several learners, and with flash_attention_2."""
    skip_no_signal: bool = True
    """Leave out the passes of samples whose advantage is exactly 0, where neither KL nor entropy moves them either, and where
    advantages are known before the passes (not with gae or kl_in reward). The gradient is the same; the metrics of tokens are
    those of the other samples."""
    overlap: bool = True
    """Groups go through forward and backward as they are finished, while the last ones are still sampled. The gradient is the
    same but for the order of its sums, which depends on timing: switch it off to repeat a run bit for bit. Without effect
    where a step needs its whole batch first (several mini-batches or iterations, a critic, a standard deviation of the batch)."""
    logprob_chunk_tokens: PositiveInt | None = None
    """Rows of logits that exist at once. None: as many as fit 64 MiB in fp32, on a GPU 256 MiB."""
    max_restarts: NonNegInt = 3
    """How often learners that died or hung are started again from the newest checkpoint, without a step more in between."""
    num_threads: PositiveInt | None = None
    """CPU threads per learner. None: 1 on CPU when there is more than one learner, else the machine's cores."""
    env: Env = {}

    @property
    def data_parallel_size(self) -> int:
        """Micro-batches that are computed at once."""
        return self.num_actors // self.sequence_parallel_size

    @model_validator(mode="after")
    def _slices(self) -> Self:
        size = self.sequence_parallel_size
        if self.num_actors % size:
            raise ValueError(
                f"learner.num_actors ({self.num_actors}) is not a multiple of learner.sequence_parallel_size ({size}), the "
                f"learners that share a micro-batch; use {-(-self.num_actors // size) * size} learners, or another size"
            )
        return self


class CriticConfig(Strict):
    """The value model of `algorithm.advantage: gae`: the policy's architecture with one output, on the learners."""

    learning_rate: PositiveFloat = 1e-5
    warmup_steps: NonNegInt = 0
    value_clip_range: PositiveFloat = 0.5
    """How far a value may move from the one that made the advantages (verl's cliprange_value)."""


class WeightsConfig(Strict):
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """auto: nccl with GPUs of their own, ipc where sampler and learner share one, gloo on CPU."""
    bucket_mb: PositiveInt = 64
    """Weights are gathered and sent in pieces of this size: the memory that a sync takes."""


def check_precision(model: ModelConfig, learner: LearnerConfig) -> None:
    if model.dtype == "bfloat16" and learner.zero_stage == 0:
        raise ValueError(
            "model.dtype bfloat16 with learner.zero_stage 0 has no fp32 master weights in DeepSpeed and drifts; "
            "use zero_stage 1 or more, or float32"
        )
    if learner.offload_params and learner.zero_stage != 3:
        raise ValueError(f"learner.offload_params needs zero_stage 3, not {learner.zero_stage}")
    if learner.offload_optimizer and learner.zero_stage == 0:
        raise ValueError("learner.offload_optimizer needs zero_stage 1 or more")
