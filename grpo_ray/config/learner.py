"""The schema of training: `learner`, `critic`, and `weights`, the weight sync to the rollout engines."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from grpo_ray.config.base import Env, Labels, NonNegFloat, NonNegInt, PositiveFloat, PositiveInt, Resources, Strict
from grpo_ray.config.model import ModelConfig
from grpo_ray.suggest import did_you_mean

DEEPSPEED_OPTIONS = {
    "train_batch_size": "prompts_per_step",
    "train_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "gradient_accumulation_steps": "learner.micro_batch_tokens",
    "gradient_clipping": "learner.max_grad_norm",
    "optimizer": "learner.learning_rate, adam_betas, adam_eps and weight_decay",
    "scheduler": "learner.lr_scheduler_type, warmup_steps and min_lr_ratio",
    **dict.fromkeys(("bf16", "bfloat16", "fp16", "torch_autocast", "data_types", "amp"), "model.dtype"),
    "activation_checkpointing": "model.gradient_checkpointing",
    "compile": "model.compile",
    "checkpoint": "checkpoint",
    **dict.fromkeys(("tensorboard", "wandb", "csv_monitor", "comet"), "tracking"),
    "sequence_parallel_size": "learner.sequence_parallel_size",
    "zero_optimization.stage": "learner.zero_stage",
    **dict.fromkeys(
        ("zero_optimization.offload_optimizer", "zero_optimization.cpu_offload"), "learner.offload_optimizer"
    ),
    **dict.fromkeys(
        ("zero_optimization.offload_param", "zero_optimization.cpu_offload_param"), "learner.offload_params"
    ),
}
"""An option of DeepSpeed -> the options here that it follows."""

DEEPSPEED_PASSED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "comms_logger",
    "dump_state",
    "steps_per_print",
)
"""The options of DeepSpeed that are passed on; of the others it silently ignores some, and some would change the loss."""

ZERO_UNUSED = frozenset(
    f"{prefix}{name}"
    for prefix in ("", "stage3_")
    for name in (
        *("gather_16bit_weights_on_model_save", "gather_fp16_weights_on_model_save", "elastic_checkpoint"),
        *("pipeline_loading_checkpoint", "load_from_fp32_weights", "legacy_stage1", "compute_grad_norm", "zenflow"),
        *("save_muon_momentum_buffer_in_memory", "cpu_offload_use_pin_memory"),
    )
)
"""Options of ZeRO for what is done here without DeepSpeed: checkpoints, masters and gradient norms."""
ZERO_3 = frozenset(
    (
        *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters"),
        *(
            "max_reuse_distance",
            "module_granularity_threshold",
            "use_all_reduce_for_fetch_params",
            "allgather_sequential",
        ),
        *("sub_group_size", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights"),
        *("memory_efficient_linear", "override_module_apply", "log_trace_cache_warnings", "leaf_module"),
    )
)
"""Options of ZeRO that stage 3 reads, some of them also under a name that begins with `stage3_`."""
ZERO_1_2 = frozenset(
    (
        *("allgather_bucket_size", "allgather_partitions", "use_multi_rank_bucket_allreduce", "round_robin_gradients"),
        *("parameter_alignment", "ignore_unused_parameters"),
    )
)
"""Options of ZeRO that stages 1 and 2 read."""


def check_deepspeed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for options of DeepSpeed that follow from others here, or do nothing here. Whether DeepSpeed has the
    rest: `learner.deepspeed_schema`."""
    zero = options.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError("learner.deepspeed.zero_optimization is a mapping, {reduce_bucket_size: ..}")
    for name in (*options, *(f"zero_optimization.{name}" for name in zero)):
        if (ours := DEEPSPEED_OPTIONS.get(name)) is not None:
            raise ValueError(f"learner.deepspeed.{name} follows {ours} here; set that")
    for name in options.keys() - set(DEEPSPEED_PASSED):
        hint = did_you_mean(name, DEEPSPEED_PASSED, then=f"passed on are {', '.join(DEEPSPEED_PASSED)}")
        raise ValueError(f"learner.deepspeed.{name} would do nothing here; {hint}")
    for name in zero.keys() & ZERO_UNUSED:
        raise ValueError(f"learner.deepspeed.zero_optimization.{name} would do nothing here; leave it out")
    return options


DeepspeedOptions = Annotated[dict[str, Any], AfterValidator(check_deepspeed_options)]


Forward = Literal["auto", "packed", "plain"]


class LearnerConfig(Strict):
    num_actors: PositiveInt = 1
    num_cpus: NonNegFloat = 1
    num_gpus: NonNegFloat | None = None
    """The number of GPUs per learner rank. None: 1 on a cluster with GPUs (0.5 when colocated), 0 elsewhere."""
    resources: Resources = {}
    labels: Labels = {}
    sequence_parallel_size: PositiveInt = 1
    """The number of learner ranks that share each micro-batch, each with a slice of its tokens: for contexts beyond one GPU
    (Ulysses; verl's ulysses_sequence_parallel_size). It must divide num_actors and the model's attention heads."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_params: bool = False
    learning_rate: PositiveFloat = 1e-6
    lr_scheduler_type: Literal["constant", "linear", "cosine", "cosine_with_min_lr"] = "constant"
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The end of cosine_with_min_lr, as a fraction of the learning rate."""
    warmup_steps: NonNegInt = 0
    weight_decay: NonNegFloat = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    micro_batch_tokens: PositiveInt = 8192
    """The number of tokens (prompt and completion) of one forward and backward pass, over all learner ranks that share it. `auto`,
    or not given: as many as fit the memory of the GPU or the machine, where it and the model are known; elsewhere 8,192, or one
    sample of full length. A run's config.yaml says how many."""
    forward: Forward = "auto"
    """How the model computes a micro-batch. `packed`: sequences end to end in one row, by attention that keeps them apart. `plain`:
    the model's own forward, one sequence a row, padded to the longest, with its own attention and masks: for models with recurrent
    or convolutional layers, or with chunked or sparse attention. `auto`: packed where that is right, else plain. In any case a
    learner that has loaded its model compares this with the model's own forward, and refuses one of which it computes something
    else."""
    packing: bool = True
    """Whether sequences are packed end to end. False: padded to the longest of a micro-batch (same gradient, more work)."""
    share_prompts: bool = True
    """Whether the prompt of a group is computed once for all its sequences in a micro-batch (same gradient, less work). Without
    effect if sequences are padded or shared by several learner ranks, with flash_attention_2, and on the plain path."""
    dropout: bool = False
    """Whether the model is trained with the dropout rates of its config.json and the noise of its routers. Old and current
    log-probabilities of the same weights differ then, and no run can be repeated bit for bit. False: all of it is off."""
    router_aux_loss_coef: NonNegFloat = 0.0
    """The weight of the load-balancing loss of a mixture of experts (Switch Transformer, 2101.03961); the value in the model's
    config.json is not read. It is Transformers' `load_balancing_loss_func` of each sequence, prompt included, by the experts that
    its tokens took; a mean over sequences, or over their tokens where the loss is one. Micro-batches and learners, however many
    there are, do not change it."""
    skip_no_signal: bool = True
    """Whether to skip the passes of samples whose advantage is exactly 0, if neither KL, entropy nor the routers' loss moves them,
    and if advantages are known before the passes (not with gae or kl_in reward). The gradient is the same; the token metrics are
    those of the other samples."""
    overlap: bool = True
    """Whether groups go through forward and backward as they finish, while the last ones are still being sampled. The gradient is
    the same but for the order of its sums, which depends on timing: switch it off to repeat a run bit for bit. Without effect if a
    step needs its whole batch first (several mini-batches or iterations, a critic, a standard deviation of the batch)."""
    logprob_chunk_tokens: PositiveInt | None = None
    """The number of rows of logits that exist at once. None: as many as fit 64 MiB in fp32, on a GPU a sixteenth of its memory:
    see `grpo_ray.models.memory.estimate.chunk_rows`."""
    max_restarts: NonNegInt = 3
    """How often learner ranks that died or hung are restarted from the newest checkpoint without a further step in between."""
    num_threads: PositiveInt | None = None
    """The number of CPU threads per learner rank. None: 1 on CPU if there are several ranks, else the machine's cores."""
    env: Env = {}
    deepspeed: DeepspeedOptions = {}
    """Other options of DeepSpeed, as its configuration names them: `{zero_optimization: {reduce_bucket_size: 50000000}}`."""

    @property
    def data_parallel_size(self) -> int:
        """The number of micro-batches that are computed at once."""
        return self.num_actors // self.sequence_parallel_size

    @model_validator(mode="before")
    @classmethod
    def _open(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("micro_batch_tokens") == "auto":
            return {key: value for key, value in data.items() if key != "micro_batch_tokens"}
        return data

    @property
    def micro_batch_is_open(self) -> bool:
        """Whether `micro_batch_tokens` is chosen for what there is."""
        return "micro_batch_tokens" not in self.model_fields_set

    @model_validator(mode="after")
    def _zero(self) -> Self:
        for name in self.deepspeed.get("zero_optimization", {}):
            of_3, stage = name.removeprefix("stage3_") in ZERO_3, self.zero_stage
            if stage == 0 or (of_3 and stage < 3) or (name in ZERO_1_2 and stage == 3):
                needed = "3" if of_3 else "1 or 2" if name in ZERO_1_2 else "1 or more"
                raise ValueError(
                    f"learner.deepspeed.zero_optimization.{name} does nothing with learner.zero_stage {stage}; it needs {needed}"
                )
        return self

    @model_validator(mode="after")
    def _slices(self) -> Self:
        size = self.sequence_parallel_size
        if size > 1 and self.forward == "plain":
            raise ValueError(
                f"learner.forward plain computes whole sequences, and learner.sequence_parallel_size {size} cuts them into slices; "
                "use sequence_parallel_size 1, or forward packed"
            )
        if size > 1 and self.router_aux_loss_coef:
            raise ValueError(
                f"learner.router_aux_loss_coef counts the experts of whole sequences, and learner.sequence_parallel_size {size} "
                "cuts them into slices; use sequence_parallel_size 1, or router_aux_loss_coef 0"
            )
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
    """How far a value may move from the one behind the advantages (verl's cliprange_value)."""


class WeightsConfig(Strict):
    backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """auto: nccl with GPUs of their own, ipc if each engine shares one with a learner, gloo on CPU."""
    bucket_mb: PositiveInt | None = None
    """The size of the pieces in which weights are gathered and sent, and so the memory that a weight sync takes; a tensor that is
    larger is a piece of its own. None: 1024 between GPUs, 64 on CPU."""
    keep_kv_cache: bool = False
    """Whether samples in progress keep their KV cache when new weights arrive (PipelineRL, 2509.19128), instead of computing what
    they have written anew. The tokens that follow are sampled from keys and values of older weights, so the learner cannot
    recompute their log-probabilities exactly: mismatch/mean_abs grows with the learning rate and with the number of updates that
    a sample lives through, and algorithm.importance_sampling has more to correct. Versions are still those of the weights that each
    token was sampled with. No sample that is requested after an update begins from what older weights computed of its prompt."""

    def bucket_bytes(self, backend: str) -> int:
        """The size of a piece for this backend (`gloo`, `nccl` or `ipc`)."""
        return (self.bucket_mb or (64 if backend == "gloo" else 1024)) << 20


def check_precision(model: ModelConfig, learner: LearnerConfig) -> None:
    if model.compile and learner.zero_stage == 3:
        raise ValueError(
            "model.compile needs learner.zero_stage 2 or less: stage 3 gathers weights in the middle of what would be compiled"
        )
    if model.compile and learner.router_aux_loss_coef:
        raise ValueError(
            "learner.router_aux_loss_coef looks at routers while they compute, and model.compile makes one program of a layer; use "
            "one of them"
        )
    if model.dtype == "bfloat16" and learner.zero_stage == 0:
        raise ValueError(
            "model.dtype bfloat16 with learner.zero_stage 0 has no fp32 master weights in DeepSpeed and drifts; "
            "use zero_stage 1 or more, or float32"
        )
    if learner.offload_params and learner.zero_stage != 3:
        raise ValueError(f"learner.offload_params needs zero_stage 3, not {learner.zero_stage}")
    if learner.offload_optimizer and learner.zero_stage == 0:
        raise ValueError("learner.offload_optimizer needs zero_stage 1 or more")
