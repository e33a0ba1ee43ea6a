"""The schema of a run. Every default exists here, once; `grpo-ray check` prints the resolved whole.

`algorithm` is in `config_algorithm.py`, `reward` in `config_reward.py`; `config_files.py` reads and writes. Names follow TRL and
verl where both mean the same. Times are in seconds (`_s`), sizes in bytes or GiB as named.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from grpo_ray.config_algorithm import AlgorithmConfig
from grpo_ray.config_base import (
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
    check_temperature,
)
from grpo_ray.config_reward import RewardConfig


class TinyModelConfig(Strict):
    """A randomly initialised Qwen2 with a character tokenizer, made on the spot: for laptops and tests."""

    hidden_size: PositiveInt = 256
    num_layers: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt = 2
    context: PositiveInt = 256
    intermediate_size: PositiveInt | None = None
    """None: 11/4 of hidden_size."""
    words: tuple[str, ...] = ()
    """Tokens of their own besides the characters."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; those above the tokenizer's ids are never in a prompt. None: the tokenizer's, rounded up to 64."""
    seed: int = 1

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.hidden_size % (32 * self.num_heads) or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} with {self.num_heads} heads and {self.num_kv_heads} key heads: vLLM's attention "
                "on CPUs takes heads of 32, 64, .. dimensions, and key heads that divide the heads"
            )
        return self


MAX_ADAPTER_RANK = 512
"""The largest that vLLM samples through."""


class LoraConfig(Strict):
    """Low-rank adapters, 2106.09685."""

    r: PositiveInt = 32
    alpha: PositiveInt = 64
    """The product is scaled by alpha / r."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of linear layers, e.g. [q_proj, v_proj]; `all-linear`: every one but the output layer."""
    transfer: Literal["merged", "adapter"] = "merged"
    """How they reach the samplers. `merged`: each sync sends the whole model with them added, and sampling is as fast as without
    them. `adapter`: a sync sends them alone, a few MB instead of the model, and samples under way finish under the version they
    began with; the samplers' base is never touched, so it can be quantised. But vLLM samples slower through adapters, on CPUs by
    far. It pays for large models on GPUs, or on a slow network, where moving the model costs more than slower sampling."""

    @model_validator(mode="after")
    def _rank(self) -> Self:
        if self.transfer == "adapter" and self.r > MAX_ADAPTER_RANK:
            raise ValueError(
                f"model.lora.r is {self.r}, and vLLM samples through adapters of at most {MAX_ADAPTER_RANK}; lower it, or use "
                "model.lora.transfer merged"
            )
        return self


class ModelConfig(Strict):
    path: HomePath | None = None
    """A folder with a Hugging Face model, or a name on the hub."""
    tiny: TinyModelConfig | None = None
    """Instead of `path`: make one."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of sampler and learner. The learner keeps fp32 master weights in either case."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """`auto`: flash-attention where a GPU and the package are, else torch's attention per packed segment."""
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None
    """Train adapters on the frozen model. The reference model then costs no memory."""
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.tiny is None):
            raise ValueError("give exactly one of model.path and model.tiny")
        return self

    @property
    def sends_adapters(self) -> bool:
        """Samplers get the adapters, not merged weights."""
        return self.lora is not None and self.lora.transfer == "adapter"


class DataSource(Strict):
    path: HomePath
    """`file.jsonl`, `file.parquet`, a Hugging Face data set (name or folder), `reasoning_gym:TASK`, or
    `python:module.function` that returns rows."""
    package: str | None = None
    """The installed package whose function `python:package.module.function` is; see `reward.functions`."""
    name: str | None = None
    """Subset; of Hugging Face data sets alone."""
    split: str = "train"
    """Also a part of one, in the words of Hugging Face's `datasets`: `train[:50%]`, `train[100:200]`. Files and generators have one
    split, `train`."""
    args: dict[str, Any] = {}
    """Passed to the generator; of reasoning_gym and python alone."""
    columns: dict[str, str] = {}
    """Name here -> name in the data, dots for nested ones: `{prompt: question, answer: metadata.answer}`."""
    limit: PositiveInt | None = None
    """Only the first rows, of the split."""

    @property
    def is_generator(self) -> bool:
        return self.path.startswith(("reasoning_gym:", "python:"))

    @property
    def is_file(self) -> bool:
        return not self.is_generator and self.path.endswith((".jsonl", ".ndjson", ".parquet"))


def _one_or_named(value: Any) -> str:
    """Which form `data.eval` has. The tags are in angle brackets: `_explain` leaves them out of what a user reads."""
    named = (
        isinstance(value, dict)
        and "path" not in value
        and any(isinstance(v, dict | DataSource) for v in value.values())
    )
    return "<named>" if named else "<one>"


Epochs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""Parts of one are rounded up to whole rows."""
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
EvalSources = Annotated[
    Annotated[DataSource, Tag("<one>")] | Annotated[dict[SetName, DataSource], Tag("<named>")],
    Discriminator(_one_or_named),
]


class DataConfig(Strict):
    train: DataSource
    eval: EvalSources | None = None
    """One source (`eval/accuracy`), or several by name (`eval/NAME/accuracy`): `{math: {path: ..}, aime: {path: ..}}`."""
    template: HomePath = "chat"
    """`chat` (the tokenizer's own; `chat:NAME` where it has several), `raw` (the prompt as it is), `r1`, `r1_zero`, or the path of
    a Jinja file."""
    system: str | None = None
    """System message of prompts that have none, under a chat template: put before strings, and before conversations that begin
    without one."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, e.g. `{enable_thinking: false}`. A row's column of this name comes before it, and a row's
    column `tools` is shown too (TRL's names; verl's apply_chat_template_kwargs)."""
    shuffle: bool = True
    max_prompt_length: PositiveInt = 512
    """Tokens."""
    long_prompts: Literal["drop", "error"] = "drop"
    """What becomes of longer ones: dropped and counted, or refused."""
    exclude_eval: bool = True
    """Drop training rows whose prompt is also in the evaluation set."""
    last_batch: Literal["short", "wrap", "drop"] = "short"
    """What becomes of the last rows of num_epochs, when they don't fill a batch; batches run over the ends of the epochs before.
    short: they are a smaller batch, so every row is trained exactly once an epoch. wrap: it is filled up from the epoch after,
    whose first rows are trained once too often. drop: they are left out. Without effect where num_steps is given."""

    @property
    def eval_sets(self) -> dict[str, DataSource]:
        """Name -> source; a single one has the name ''."""
        if self.eval is None:
            return {}
        return self.eval if isinstance(self.eval, dict) else {"": self.eval}


class RolloutConfig(Strict):
    """Where a recipe does not name them, a command chooses num_actors, num_cpus and cluster.placement for its machine, here and in
    `reward` and `learner`; see `actors.placement_defaults`. The defaults here are what is left where nothing fits."""

    num_actors: PositiveInt = 1
    min_actors: PositiveInt | None = None
    max_actors: PositiveInt | None = None
    """Both given, the run scales itself between them: see `grpo_ray.scaling.decide`. num_actors is what it begins with."""
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


class RunConfig(Strict):
    """A GRPO run: `grpo-ray train`."""

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
    prompts_per_step: PositiveInt = 32
    """P (verl's train_batch_size). A step trains on P x rollout.num_generations samples."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    weights: WeightsConfig = WeightsConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def colocated(self) -> bool:
        return self.cluster.placement == "colocated"

    @property
    def samples_under_way(self) -> int:
        """At once, at most."""
        return (self.algorithm.max_staleness + 1) * self.prompts_per_step * self.rollout.num_generations

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.reward.functions:
            raise ValueError("reward.functions is empty: name at least one reward, e.g. [{name: accuracy}]")
        names = [f.title for f in self.reward.functions]
        if (twice := next((n for n in names if names.count(n) > 1), None)) is not None:
            raise ValueError(
                f"reward.functions has {twice!r} more than once, and their metrics could not be told apart; give each a label"
            )
        if self.eval.accuracy is not None and self.eval.accuracy not in names:
            raise ValueError(f"eval.accuracy is {self.eval.accuracy!r}, which is none of reward.functions: {names}")
        samples = self.prompts_per_step * self.rollout.num_generations
        if self.algorithm.num_mini_batches > self.prompts_per_step:
            raise ValueError(
                f"algorithm.num_mini_batches ({self.algorithm.num_mini_batches}) is more than "
                f"prompts_per_step ({self.prompts_per_step}): a mini-batch holds at least one group"
            )
        if self.learner.data_parallel_size > samples:
            raise ValueError(
                f"learner.num_actors ({self.learner.num_actors}) is more than the {samples} samples of a step; "
                "lower it, or raise prompts_per_step or learner.sequence_parallel_size"
            )
        longest = self.data.max_prompt_length + self.rollout.max_completion_length
        if self.learner.micro_batch_tokens < longest:
            raise ValueError(
                f"learner.micro_batch_tokens ({self.learner.micro_batch_tokens}) can't hold one sample of up to {longest} tokens "
                "(data.max_prompt_length + rollout.max_completion_length); raise it"
            )
        if self.algorithm.ref_refresh_steps and self.model.lora is not None:
            raise ValueError(
                "algorithm.ref_refresh_steps needs a reference model of its own, and with model.lora the policy without its "
                "adapters is the reference: take one of them out"
            )
        if self.algorithm.ref_polyak_tau < 1 and self.model.dtype == "bfloat16":
            raise ValueError(
                "algorithm.ref_polyak_tau below 1 moves the reference by steps that model.dtype bfloat16 rounds away; use "
                "float32, or take the policy over whole (tau 1) every algorithm.ref_refresh_steps"
            )
        for section, part in (("rollout", self.rollout), ("eval", self.eval), ("sample", self.sample)):
            check_temperature(section, part.temperature)
        if self.rollout.truncation and self.algorithm.max_staleness:
            raise ValueError(
                f"rollout.{self.rollout.truncation} leaves out tokens by the policy that samples, and with algorithm.max_staleness "
                f"{self.algorithm.max_staleness} the learner no longer has that one: it could not renormalise over what is left. "
                "Use max_staleness 0, or top_p 1, top_k 0 and min_p 0"
            )
        if self.colocated and (ahead := self.algorithm.max_staleness):
            raise ValueError(
                f"algorithm.max_staleness is {ahead}, and with cluster.placement colocated samplers and learners take turns, so "
                "sampling can't run ahead: use 0, or placement disaggregated"
            )
        if self.colocated and self.rollout.max_actors is not None:
            raise ValueError(
                "rollout.max_actors lets the number of samplers change, and with cluster.placement colocated there is one for each "
                "learner: take it and min_actors out, or use placement disaggregated"
            )
        if self.colocated and self.rollout.labels != self.learner.labels:
            raise ValueError(
                f"with cluster.placement colocated an engine and a learner are on one node: rollout.labels {self.rollout.labels} "
                f"and learner.labels {self.learner.labels} have to be the same"
            )
        if self.model.sends_adapters and self.weights != WeightsConfig():
            raise ValueError(
                "weights is about sending the whole model, which model.lora.transfer adapter never does: take it out, or use "
                "model.lora.transfer merged"
            )
        if self.critic != CriticConfig() and self.algorithm.advantage != "gae":
            raise ValueError("critic is PPO's value model: it needs algorithm.advantage gae (or algorithm: ppo)")
        _check_precision(self.model, self.learner)
        return self


class SftConfig(Strict):
    """Supervised fine-tuning with the same learner: `grpo-ray sft`."""

    name: str | None = None
    dir: HomePath = "runs"
    code_dir: HomePath | None = None
    seed: int = 1
    num_steps: PositiveInt | None = None
    num_epochs: Epochs = 1.0
    examples_per_step: PositiveInt = 128
    max_length: PositiveInt = 1024
    """Prompt and completion; longer examples are dropped and counted, or refused (data.long_prompts)."""

    model: ModelConfig
    data: DataConfig
    learner: LearnerConfig = LearnerConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.learner.micro_batch_tokens < self.max_length:
            raise ValueError(
                f"learner.micro_batch_tokens ({self.learner.micro_batch_tokens}) can't hold one example of max_length "
                f"({self.max_length}) tokens; raise it"
            )
        if self.model.sends_adapters:
            raise ValueError(
                "model.lora.transfer adapter is how samplers get the adapters, and fine-tuning has no samplers: take it out"
            )
        if self.learner.data_parallel_size > self.examples_per_step:
            raise ValueError(
                f"learner.num_actors ({self.learner.num_actors}) is more than examples_per_step ({self.examples_per_step})"
            )
        _check_precision(self.model, self.learner)
        return self


class DpoOptions(Strict):
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO 2305.18290. ipo: 2310.12036, on means over tokens."""
    beta: PositiveFloat = 0.1
    """What a departure from the reference, the model at the start, costs."""


class DpoConfig(SftConfig):
    """Direct preference optimisation: `grpo-ray dpo`. Its examples are pairs; `max_length` is of a prompt with either answer."""

    dpo: DpoOptions = DpoOptions()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _check_room_for_pairs(self)
        return self


class RewardModelOptions(Strict):
    loss: Literal["bradley_terry", "bce", "mse"] = "bradley_terry"
    """bradley_terry: pairs (`prompt`, `chosen`, `rejected`). bce, mse: single answers (`prompt`, `completion`, `label`), a label
    in [0, 1] or any number."""
    use_margin: bool = False
    """Scores of a pair should differ by the row's column `margin` at least (Llama 2 2307.09288)."""

    @property
    def pairwise(self) -> bool:
        return self.loss == "bradley_terry"

    @model_validator(mode="after")
    def _margin(self) -> Self:
        if self.use_margin and not self.pairwise:
            raise ValueError(
                f"reward_model.use_margin is about pairs, and reward_model.loss is {self.loss}; take one of them out"
            )
        return self


class RewardModelConfig(SftConfig):
    """Training of a reward model: `grpo-ray reward-model`. DeepSeek-R1's: batch 256, rate 6e-6, one epoch of 66,000 pairs."""

    reward_model: RewardModelOptions = RewardModelOptions()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.reward_model.pairwise:
            _check_room_for_pairs(self)
        if self.model.lora is not None:
            raise ValueError("model.lora would leave a reward model's output layer untrained: train it whole")
        return self


def preferences(config: RunConfig | SftConfig) -> DpoOptions | RewardModelOptions | None:
    """What is learnt of preferences; None: something else is."""
    match config:
        case DpoConfig():
            return config.dpo
        case RewardModelConfig():
            return config.reward_model
    return None


def _check_room_for_pairs(config: SftConfig) -> None:
    if config.learner.micro_batch_tokens < 2 * config.max_length:
        raise ValueError(
            f"learner.micro_batch_tokens ({config.learner.micro_batch_tokens}) can't hold the two answers of a pair of max_length "
            f"({config.max_length}) tokens each; raise it to {2 * config.max_length}"
        )


def _check_precision(model: ModelConfig, learner: LearnerConfig) -> None:
    if model.dtype == "bfloat16" and learner.zero_stage == 0:
        raise ValueError(
            "model.dtype bfloat16 with learner.zero_stage 0 has no fp32 master weights in DeepSpeed and drifts; "
            "use zero_stage 1 or more, or float32"
        )
    if learner.offload_params and learner.zero_stage != 3:
        raise ValueError(f"learner.offload_params needs zero_stage 3, not {learner.zero_stage}")
    if learner.offload_optimizer and learner.zero_stage == 0:
        raise ValueError("learner.offload_optimizer needs zero_stage 1 or more")
