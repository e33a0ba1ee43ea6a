"""The schema of sampling: `rollout` in training, with `eval` and `sample`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from grpo_ray.config.base import (
    Env,
    Labels,
    NonNegFloat,
    NonNegInt,
    PositiveFloat,
    PositiveInt,
    Resources,
    Strict,
    check_bounds,
)
from grpo_ray.types import SamplingParams


class RolloutConfig(Strict):
    """The rollout engines. If a recipe does not set num_actors, num_cpus and cluster.placement, a command chooses them for its
    machine, here and in `reward` and `learner`; see `actors.placement_defaults`. The defaults here apply if nothing fits."""

    num_actors: PositiveInt = 1
    min_actors: PositiveInt | None = None
    max_actors: PositiveInt | None = None
    """The upper bound of scaling. With both bounds given, the run scales itself between them, starting with num_actors: see
    `grpo_ray.config.scaling.decide`."""
    num_cpus: NonNegFloat = 1
    num_gpus: NonNegFloat | None = None
    """The number of GPUs per engine. None: tensor_parallel_size on a cluster with GPUs (0.5 when colocated), 0 elsewhere."""
    resources: Resources = {}
    labels: Labels = {}
    """The labels of the nodes on which they may be placed; the same for the other roles."""
    tensor_parallel_size: PositiveInt = 1
    num_generations: int = 8
    """G, the number of samples per prompt."""
    max_completion_length: PositiveInt = 512
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The nucleus of sampling. With top_p, top_k or min_p the learner renormalises over exactly the tokens that could be sampled,
    in the old, the current and the reference policy alike, and the entropy does too (DeepSeek-V3.2's keep sampling mask,
    2512.02556): only on-policy."""
    top_k: NonNegInt = 0
    """The number of most likely tokens to sample from; 0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop: tuple[str, ...] = ()
    """Texts that end a sample, searched in it as it is written, special tokens included. They stay in what rewards see; but a
    special token that ends a turn (`<|im_end|>`, not `</answer>`) does not."""
    stop_token_ids: tuple[NonNegInt, ...] = ()
    """Token ids that end a sample, besides the model's end-of-sequence tokens and the one that ends the chat template's turns."""
    max_num_seqs: PositiveInt = 256
    """The number of sequences that one rollout engine samples at once."""
    kv_cache_gb: PositiveFloat | None = None
    """The size of the KV cache. None: 0.25 on CPU; on GPU what gpu_memory_utilization leaves."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    enforce_eager: bool | None = None
    """Whether vLLM skips compilation. None: True on CPU (compiling gains nothing there), False on GPU."""
    num_threads: PositiveInt | None = None
    """The number of CPU threads per rollout engine. None: 1, because threads that share a core spin against each other; when
    colocated, the machine's cores divided among the engines."""
    env: Env = {}

    @property
    def truncation(self) -> str:
        """Those of top_p, top_k and min_p that leave tokens out, in words."""
        names = (n for n in ("top_p", "top_k", "min_p") if getattr(self, n) != type(self).model_fields[n].default)
        return ", ".join(f"{name} {getattr(self, name):g}" for name in names)

    @property
    def sampling_params(self) -> SamplingParams:
        """The sampling parameters of training; `eval` and `sample` replace some of them."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            max_tokens=self.max_completion_length,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
        )

    @model_validator(mode="after")
    def _group(self) -> Self:
        if self.num_generations < 2:
            raise ValueError(
                f"rollout.num_generations is {self.num_generations}: a group of one has no baseline to compare with; use 2 or more"
            )
        check_bounds("rollout", self.num_actors, self.min_actors, self.max_actors)
        return self


class EvalConfig(Strict):
    every_steps: NonNegInt = 0
    """The number of steps between evaluations. 0: only before the first step and after the last one."""
    num_samples: PositiveInt = 1
    """The number of samples k per prompt: pass@1 is the mean over them; above 1 there are pass@k and cons@k too. DeepSeek-R1: 64 on
    AIME, temperature 0.6, top_p 0.95. At temperature 0 all samples of a prompt are the same."""
    temperature: NonNegFloat = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    accuracy: str | None = None
    """The reward function that is the accuracy. None: the first of reward.functions."""
    threshold: float = 1.0
    """The smallest value of that function at which a sample counts as right."""


class SampleConfig(Strict):
    """Options of `grpo-ray sample`: every prompt of data.train in order, scored by reward.functions, to Parquet."""

    num_samples: PositiveInt = 4
    """The number of samples per prompt."""
    temperature: NonNegFloat = 1.0
    """The sampling temperature; R1's cold start samples at 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    shard_prompts: PositiveInt = 128
    """The number of prompts per file. A restarted run samples the prompts of missing files again."""
