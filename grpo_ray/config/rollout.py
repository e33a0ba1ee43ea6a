"""The schema of what samples: `rollout` in training, `eval` and `sample` beside it."""

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


class RolloutConfig(Strict):
    """Where a recipe does not name them, a command chooses num_actors, num_cpus and cluster.placement for its machine, here and in
    `reward` and `learner`; see `actors.placement_defaults`. The defaults here are what is left where nothing fits."""

    num_actors: PositiveInt = 1
    min_actors: PositiveInt | None = None
    max_actors: PositiveInt | None = None
    """Both given, the run scales itself between them: see `grpo_ray.config.scaling.decide`. num_actors is what it begins with."""
    num_cpus: NonNegFloat = 1
    num_gpus: NonNegFloat | None = None
    """Per actor. None: tensor_parallel_size on a cluster with GPUs (0.5 when colocated), 0 elsewhere."""
    resources: Resources = {}
    labels: Labels = {}
    """Of the nodes that they may be put on; so for the other kinds."""
    tensor_parallel_size: PositiveInt = 1
    num_generations: int = 8
    """G, samples per prompt."""
    max_completion_length: PositiveInt = 512
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """With top_p, top_k or min_p the learner renormalises over the very tokens that could be drawn, in the old, the current and the
    reference policy alike, and so does the entropy (DeepSeek-V3.2's keep sampling mask, 2512.02556): only on-policy."""
    top_k: NonNegInt = 0
    """0: all."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop: tuple[str, ...] = ()
    """Texts that end a sample, looked for in it as it is written, special tokens included. They stay in what rewards see; but a
    special token that ends a turn (`<|im_end|>`, not `</answer>`) does not."""
    stop_token_ids: tuple[NonNegInt, ...] = ()
    """Tokens that end one, besides the model's end-of-sequence tokens and the one that ends the chat template's turns."""
    max_num_seqs: PositiveInt = 256
    """Sequences that one engine samples at once."""
    kv_cache_gb: PositiveFloat | None = None
    """None: 0.25 on CPU; on GPU what gpu_memory_utilization leaves."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    enforce_eager: bool | None = None
    """None: True on CPU (compiling gains nothing there), False on GPU."""
    num_threads: PositiveInt | None = None
    """CPU threads per engine. None: 1, for threads that share a core spin against each other; when colocated, the machine's cores
    divided among the engines."""
    env: Env = {}

    @property
    def truncation(self) -> str:
        """Of top_p, top_k and min_p those that leave tokens out, in words."""
        names = (n for n in ("top_p", "top_k", "min_p") if getattr(self, n) != type(self).model_fields[n].default)
        return ", ".join(f"{name} {getattr(self, name):g}" for name in names)

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
    """0: only before the first step and after the last one."""
    num_samples: PositiveInt = 1
    """k of pass@1 as the mean over k samples; above 1 also pass@k and cons@k. DeepSeek-R1: 64 on AIME, temperature 0.6,
    top_p 0.95. At temperature 0 all samples of a prompt are the same."""
    temperature: NonNegFloat = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    accuracy: str | None = None
    """Which reward function is the accuracy. None: the first of reward.functions."""
    threshold: float = 1.0
    """A sample counts as right when that function gives at least this."""


class SampleConfig(Strict):
    """`grpo-ray sample`: every prompt of data.train in its order, scored by reward.functions, to Parquet."""

    num_samples: PositiveInt = 4
    """Of each prompt."""
    temperature: NonNegFloat = 1.0
    """R1's cold start samples at 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    shard_prompts: PositiveInt = 128
    """Prompts of one file. A run that was killed makes the prompts again whose file is not there."""
