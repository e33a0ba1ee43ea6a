"""The schema of sampling: `rollout` in training, with `eval` and `sample`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from grpo_ray.config.base import (
    Env,
    HomePath,
    Labels,
    NonNegFloat,
    NonNegInt,
    PositiveFloat,
    PositiveInt,
    Resources,
    Strict,
    check_bounds,
)
from grpo_ray.errors import ConfigError
from grpo_ray.types import SamplingParams

ENGINE_OPTIONS = {
    "model": "model.path",
    "model_weights": "model.path",
    "tokenizer": "model.path",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "seed",
    "max_model_len": "data.max_prompt_length and rollout.max_completion_length",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "data_parallel_size": "rollout.data_parallel_size",
    "pipeline_parallel_size": "rollout.tensor_parallel_size",
    "max_num_seqs": "rollout.max_num_seqs",
    "max_num_batched_tokens": "rollout.max_num_batched_tokens",
    "kv_cache_dtype": "rollout.kv_cache_dtype",
    "kv_cache_memory_bytes": "rollout.kv_cache_gb",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "quantization": "rollout.quantization",
    "quantization_config": "rollout.quantization",
    "speculative_config": "rollout.speculative",
    "spec_method": "rollout.speculative.method",
    "spec_model": "rollout.speculative.model",
    "spec_tokens": "rollout.speculative.num_tokens",
    "enforce_eager": "rollout.enforce_eager",
    "enable_sleep_mode": "cluster.placement",
    "enable_return_routed_experts": "rollout.keep_routing",
    "aux_output_config": "rollout.keep_routing",
    "weight_transfer_config": "weights.backend",
    "enable_lora": "model.lora",
    "max_loras": "algorithm.max_staleness",
    "max_lora_rank": "model.lora.r",
    "generation_config": "rollout.temperature, top_p, top_k, min_p and stop_token_ids",
    "override_generation_config": "rollout.temperature, top_p, top_k, min_p and stop_token_ids",
}
"""An option of vLLM's engine -> the options here that it follows."""

_SAME_MODEL = "the learner would train another model than the one that samples"
_OWN = "samples and weights travel by it"
ENGINE_FIXED = {
    **dict.fromkeys(("hf_overrides", "hf_config_path", "model_class_overrides"), _SAME_MODEL),
    **dict.fromkeys(("revision", "code_revision", "tokenizer_revision"), _SAME_MODEL),
    "logits_processors": "the learner could not recompute the probabilities that it changes",
    **dict.fromkeys(("scheduler_cls", "worker_cls", "worker_extension_cls", "distributed_executor_backend"), _OWN),
    **dict.fromkeys(("logprobs_mode", "skip_tokenizer_init", "runner", "convert", "tokens_only"), _OWN),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port"), "an engine is one actor, on one node"),
}
"""An option of vLLM's engine that can't be set -> why."""

ENGINE_ON_GPUS = frozenset(
    ("async_scheduling", "attention_backend", "compilation_config", "disable_custom_all_reduce", "enable_dbo")
)
"""Options of vLLM's engine that its CPU platform sets or ignores."""


def check_engine_options(options: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for options of vLLM that follow from others here. Whether vLLM has the rest: `rollout.vllm_schema`."""
    for name in options:
        if (ours := ENGINE_OPTIONS.get(name)) is not None:
            raise ValueError(f"rollout.engine.{name} follows {ours} here; set that")
        if (why := ENGINE_FIXED.get(name)) is not None or name.startswith("data_parallel_"):
            raise ValueError(f"rollout.engine.{name} can't be changed: {why or 'an engine is one actor, on one node'}")
    return options


EngineOptions = Annotated[dict[str, Any], AfterValidator(check_engine_options)]

LARGE_GPU_BYTES = 70 << 30
"""What a GPU of 80 GB has at least; engines on such ones take more at once."""


class SpeculativeConfig(Strict):
    """Speculative decoding: a draft proposes tokens, and the model keeps those that it would have sampled too, so samples are
    distributed as without it. The draft is never trained: as the model moves away from it, fewer tokens are kept."""

    model: HomePath | None = None
    """A smaller model with the same tokens, or an EAGLE head. None: n-grams of the prompt and the sample so far."""
    method: Literal["draft_model", "ngram", "eagle", "eagle3"] | None = None
    """None: draft_model with a model, else ngram."""
    num_tokens: PositiveInt = 3
    """The number of tokens that are proposed at once."""

    @model_validator(mode="after")
    def _draft(self) -> Self:
        if self.method is not None and (self.method == "ngram") != (self.model is None):
            raise ValueError(
                f"rollout.speculative.method {self.method} "
                + ("takes no model: leave it out" if self.model else "needs rollout.speculative.model, its draft")
            )
        return self


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
    """The number of GPUs per engine. None: tensor_parallel_size x data_parallel_size on a cluster with GPUs (half of that when
    colocated), 0 elsewhere."""
    resources: Resources = {}
    labels: Labels = {}
    """The labels of the nodes on which they may be placed; the same for the other roles."""
    tensor_parallel_size: PositiveInt = 1
    """The number of GPUs over which an engine spreads each layer. Experts too, with `engine: {enable_expert_parallel: true}`. When
    colocated, it shares them with as many learner ranks: learner.num_actors is num_actors times this."""
    data_parallel_size: PositiveInt = 1
    """The number of copies of the attention layers in an engine; its experts are spread over all of its GPUs, this times
    tensor_parallel_size of them. For mixtures of experts: of other models more engines (num_actors) do the same."""
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
    """The number of sequences that one rollout engine samples at once. A run that leaves it open takes 1,024 on GPUs of 80 GB and
    more."""
    max_num_batched_tokens: PositiveInt | None = None
    """The number of tokens of one step of an engine, prompts included. None: 16,384 on GPUs of 80 GB and more, 8,192 on others; on
    CPUs 2,048, or the longest sample."""
    kv_cache_gb: PositiveFloat | None = None
    """The size of the KV cache. None: 0.25 on CPU; on GPU what gpu_memory_utilization leaves."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """The precision of the KV cache. auto: the model's. fp8 holds twice as many tokens, and moves the policy that samples away from
    the one that is trained: see `quantization`."""
    quantization: Literal["fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8"] | None = None
    """The precision of an engine's products, whose weights it rounds anew after each weight sync; the learner keeps model.dtype.
    Such samples are another policy's, so training needs a correction: algorithm.importance_sampling, or old_logprobs rollout."""
    speculative: SpeculativeConfig | None = None
    keep_routing: bool = False
    """Whether the learner takes, for each token in each layer of a mixture of experts, the experts that the engine took
    (DeepSeek-V3.2's keep routing, 2512.02556; rollout routing replay, R3, 2510.11370), with the weights that its own router gives
    them: engine and learner round differently, and where two experts are nearly equal they would take different ones. The reference
    routes by itself. A sample grows by a byte for each token, layer and expert (two with more than 256 experts). On CPUs engines
    cache no prompts then."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.85
    enforce_eager: bool | None = None
    """Whether vLLM skips compilation. None: True on CPU (compiling gains nothing there), False on GPU."""
    num_threads: PositiveInt | None = None
    """The number of CPU threads per rollout engine. None: 1, because threads that share a core spin against each other; when
    colocated, the machine's cores divided among the engines."""
    env: Env = {}
    engine: EngineOptions = {}
    """Other options of vLLM's engine, as its AsyncEngineArgs names them: `{enable_prefix_caching: false}`."""

    @property
    def engine_size(self) -> int:
        """The number of workers, and of GPUs, of an engine."""
        return self.tensor_parallel_size * self.data_parallel_size

    @property
    def reduced_precision(self) -> str:
        """The options by which engines compute more coarsely than the learner, in words."""
        rounds = {"quantization": self.quantization, "kv_cache_dtype": self.kv_cache_dtype}
        return ", ".join(f"rollout.{name} {value}" for name, value in rounds.items() if value not in (None, "auto"))

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


def check_without_gpus(rollout: RolloutConfig) -> None:
    """Raises ConfigError for options that engines on CPUs can't follow."""
    if rollout.reduced_precision:
        raise ConfigError(f"{rollout.reduced_precision} needs a GPU, and there is none; leave it out")
    if rollout.data_parallel_size > 1:
        raise ConfigError(
            f"rollout.data_parallel_size is {rollout.data_parallel_size}, and there is no GPU to spread experts over; use more "
            "engines, rollout.num_actors"
        )
    if rollout.speculative is not None:
        # Tried with vLLM 0.32: their log-probabilities are NaN, and the samples are not the model's.
        raise ConfigError(
            "rollout.speculative needs a GPU, and there is none: on CPUs vLLM computes wrong probabilities for tokens that a draft "
            "proposes; leave it out"
        )
    if rollout.keep_routing:
        _check_routes_on_cpus(rollout)


def _check_routes_on_cpus(rollout: RolloutConfig) -> None:
    """Raises ConfigError where the experts that tokens take on CPUs can't be told."""
    wrong = {
        "rollout.engine.enable_prefix_caching true: of a prompt that is cached no experts are known": rollout.engine.get(
            "enable_prefix_caching"
        ),
        "rollout.enforce_eager false: a compiled layer tells nothing": rollout.enforce_eager is False,
        f"rollout.tensor_parallel_size {rollout.tensor_parallel_size}: the experts are told within one process": (
            rollout.tensor_parallel_size > 1
        ),
    }
    if (why := next((text for text, is_so in wrong.items() if is_so), None)) is not None:
        raise ConfigError(f"rollout.keep_routing on CPUs does not go with {why}; leave one of them out")


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
