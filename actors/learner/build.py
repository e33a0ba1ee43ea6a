"""Config -> DeepSpeed engine: its settings and the model. No update happens here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from actors.learner.deepspeed_schema import check_deepspeed
from actors.learner.optimizer import adamw, make_schedule
from actors.learner.shards import Skeleton, exact_buffers, exact_pieces, own_piece, stored_dtype
from actors.learner.zero_state import set_masters
from grpo_ray.algorithm.objectives import GrpoObjective, Objective, SftObjective
from grpo_ray.algorithm.objectives_pairs import DpoObjective, RewardModelObjective
from grpo_ray.batch.sequence import SequenceRanks
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.learner import CriticConfig, LearnerConfig, WeightsConfig
from grpo_ray.config.model import ModelConfig
from grpo_ray.config.supervised import DpoOptions, RewardModelOptions
from grpo_ray.errors import ConfigError, NonFiniteError
from grpo_ray.models.attention import FLASH, PACKED, choose_attention
from grpo_ray.models.compiled import compile_layers
from grpo_ray.models.features.dropout import without_dropout, without_noise
from grpo_ray.models.features.rope import has_ropes_by_length, use_ropes_of_each_sequence
from grpo_ray.models.features.routing import Routing, find_routers
from grpo_ray.models.files.checkpoint_tensors import check_trainable, read_model
from grpo_ray.models.linear import use_faster_products
from grpo_ray.models.lora import inject
from grpo_ray.models.memory.estimate import chunk_rows
from grpo_ray.models.multimodal import empty_whole, text_part, whole_class
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.reward import RewardModel
from grpo_ray.models.trainable import MAKING, why_not
from grpo_ray.models.value import ValueModel


@dataclass(frozen=True)
class LearnerSpec:
    """What a learner rank is made from: its slices of the run's config, and a few facts that the group works out."""

    model_path: str
    run_dir: str
    seed: int
    model: ModelConfig
    learner: LearnerConfig
    algorithm: AlgorithmConfig | None
    """The algorithm; None: supervised, on demonstrations or on `preferences`."""
    preferences: DpoOptions | RewardModelOptions | None
    critic: CriticConfig
    weights: WeightsConfig | None
    """The config of weight syncs; None: there are none."""
    weights_backend: str
    """`gloo`, `nccl` or `ipc`."""
    max_completion_length: int
    """The rollout engine's limit, for dr_grpo."""
    num_optimizer_steps: int | None
    """The optimizer steps of the whole run, for schedules that need an end."""
    collective_timeout_s: float
    sync_timeout_s: float
    keep_routing: bool = False
    """Whether samples come with the experts that their tokens took, for the policy to take them too."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.model.dtype == "bfloat16" else torch.float32

    @property
    def is_plain(self) -> bool:
        """Whether the model goes the plain way; see actors/learner/forward.py."""
        return self.learner.forward == "plain"

    @property
    def is_reward_model(self) -> bool:
        return isinstance(self.preferences, RewardModelOptions)

    @property
    def needs_critic(self) -> bool:
        return self.algorithm is not None and self.algorithm.advantage == "gae"

    @property
    def needs_reference(self) -> bool:
        return self.algorithm is not None and self.algorithm.beta > 0

    @property
    def needs_reference_model(self) -> bool:
        """Whether a reference model is loaded; with adapters the policy without them is the reference."""
        return self.needs_reference and self.model.lora is None

    @property
    def saves_reference(self) -> bool:
        """Whether the reference is saved, because it is no longer the model of `model_path`."""
        return self.needs_reference_model and self.algorithm is not None and self.algorithm.ref_refresh_steps > 0


def build_objective(spec: LearnerSpec) -> Objective:
    """The loss that this learner is trained with."""
    match spec.preferences:
        case DpoOptions() as options:
            return DpoObjective(options)
        case RewardModelOptions() as options:
            return RewardModelObjective(options)
    return SftObjective() if spec.algorithm is None else GrpoObjective(spec.algorithm)


def deepspeed_config(model: ModelConfig, learner: LearnerConfig, device: torch.device) -> dict[str, Any]:
    """The settings of DeepSpeed. Losses are already normalised, and one `step()` follows any number of `backward()`.

    Raises:
        ConfigError: DeepSpeed has no option of `learner.deepspeed`.
    """
    check_deepspeed(learner)
    # At stage 1 DeepSpeed refuses it for passes whose number it does not know; on CPUs there is nothing to overlap with.
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    zero["overlap_comm"] = device.type == "cuda" and learner.zero_stage >= 2
    if learner.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if learner.offload_params:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": learner.max_grad_norm,
        "steps_per_print": 1 << 30,
        "zero_optimization": zero,
        # The optimizer is torch's: it needs no compiler, and its fused form is as fast as DeepSpeed's.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if model.dtype == "bfloat16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    zero |= learner.deepspeed.get("zero_optimization", {})
    return config | learner.deepspeed | {"zero_optimization": zero}


def build_engine(spec: LearnerSpec, device: torch.device, ranks: SequenceRanks) -> Any:
    """The policy in a DeepSpeed engine, with fp32 master weights that hold the checkpoint exactly."""
    make = _reward_model if spec.is_reward_model else partial(_policy, trained=True)
    policy = make(spec, device, ranks).train()
    optimizer = adamw(policy, spec.learner, spec.learner.learning_rate)
    return _initialize(
        spec, device, policy, optimizer, make_schedule(optimizer, spec.learner, spec.num_optimizer_steps)
    )


def build_critic(spec: LearnerSpec, device: torch.device, ranks: SequenceRanks) -> Any:
    """The value model in an engine of its own, at a constant learning rate after its warm-up."""
    from transformers import get_constant_schedule_with_warmup

    whole = replace(spec, model=spec.model.model_copy(update={"lora": None}))
    hf = load_hf(whole, device, ranks, trained=True)
    critic = ValueModel(hf, ranks, plain=spec.is_plain).train()
    optimizer = adamw(critic, spec.learner, spec.critic.learning_rate)
    schedule = get_constant_schedule_with_warmup(optimizer, spec.critic.warmup_steps)
    return _initialize(spec, device, critic, optimizer, schedule)


def _initialize(
    spec: LearnerSpec, device: torch.device, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any
) -> Any:
    import deepspeed

    exact = {} if spec.dtype == torch.float32 else _unrounded(model, spec.dtype)
    pieces = exact_pieces(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config=deepspeed_config(spec.model, spec.learner, device),
        dist_init_required=False,
    )
    # DeepSpeed makes the masters from the weights that it has just rounded to bf16.
    for name, param in engine.module.named_parameters():
        if param in exact and hasattr(param, "ds_id"):
            pieces[name] = own_piece(param, exact[param])
        elif param in exact:
            deepspeed.utils.safe_set_full_fp32_param(param, exact[param].to(device))
    set_masters(engine, pieces)
    if spec.learner.zero_stage == 0:
        engine.clip_fp32_gradients = partial(_clip_at_stage_0, engine, spec.learner.max_grad_norm)
    return engine


def _unrounded(model: nn.Module, dtype: torch.dtype) -> dict[nn.Parameter, torch.Tensor]:
    """The values, where the compute dtype rounds them, of what is trained and not sharded yet. It is cast here where the rest is
    sharded, since DeepSpeed then takes all of it to be of that dtype."""
    sharded = any(hasattr(p, "ds_id") for p in model.parameters())
    whole = {p: p.data for p in model.parameters() if not hasattr(p, "ds_id")}
    if sharded:
        for param, value in whole.items():
            param.data = value.to(dtype)
    return {param: value for param, value in whole.items() if param.requires_grad and value.dtype != dtype}


def _clip_at_stage_0(engine: Any, max_norm: float) -> None:
    """Clip in place of the engine's own clipping, which does not return the norm and would apply one that is not finite."""
    params = [p for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    engine._global_grad_norm = norm
    if not norm.isfinite():
        engine.zero_grad()


def step(engine: Any, factor: float = 1.0) -> float:
    """Take one optimizer step; returns the gradient's norm before clipping.

    Args:
        factor: the accumulated gradient is multiplied by this.

    Raises:
        NonFiniteError: the norm is not finite; the weights are unchanged.
    """
    with _scaled(engine, factor):
        engine.step()
    norm = float(engine.get_global_grad_norm())
    if not engine.was_step_applied() or norm != norm or norm == float("inf"):
        raise NonFiniteError(f"the gradient is not finite (norm {norm}); the weights were left as they are")
    return norm


@contextmanager
def _scaled(engine: Any, factor: float) -> Iterator[None]:
    """Inside, `engine.step()` takes the accumulated gradient times `factor`, under any ZeRO stage and dtype."""
    optimizer = engine.optimizer
    if factor == 1.0:
        yield
    elif hasattr(optimizer, "override_loss_scale"):
        # DeepSpeed divides by the scale of the loss before it computes the norm.
        optimizer.override_loss_scale(1 / factor)
        try:
            yield
        finally:
            optimizer.override_loss_scale(1.0)
    else:
        held = getattr(optimizer, "fp32_groups_gradients_flat", None)
        for grad in held or [p.grad for p in engine.module.parameters() if p.grad is not None]:
            grad.mul_(factor)
        yield


def build_reference(spec: LearnerSpec, device: torch.device, ranks: SequenceRanks) -> nn.Module:
    """The frozen policy as it was at the start; sharded under ZeRO-3. See actors/learner/reference.py for what follows."""
    import deepspeed

    policy = _policy(spec, device, ranks, trained=False).eval()
    policy.requires_grad_(False)
    if spec.learner.zero_stage < 3:
        return policy.to(device)
    config = deepspeed_config(spec.model, spec.learner, device)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine: nn.Module = deepspeed.initialize(model=policy, config=config, dist_init_required=False)[0]
    return engine


def _policy(spec: LearnerSpec, device: torch.device, ranks: SequenceRanks, *, trained: bool) -> PolicyModel:
    hf = load_hf(spec, device, ranks, trained=trained)
    on_gpu = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else None
    rows = chunk_rows(hf.config.get_text_config().vocab_size, on_gpu=on_gpu, memory=memory)
    chunk, routing = spec.learner.logprob_chunk_tokens or rows, _routing(spec, hf, ranks) if trained else None
    return PolicyModel(hf, chunk=chunk, ranks=ranks, plain=spec.is_plain, routing=routing)


def _reward_model(spec: LearnerSpec, device: torch.device, ranks: SequenceRanks) -> RewardModel:
    """The reward model, with an output layer of zeros unless the checkpoint is a reward model already."""
    hf = load_hf(spec, device, ranks, trained=True)
    return RewardModel(hf, ranks, plain=spec.is_plain, routing=_routing(spec, hf, ranks))


def _routing(spec: LearnerSpec, hf: Any, ranks: SequenceRanks) -> Routing | None:
    """The model's routers; None where nobody can look at them: there are none, they are compiled, or see slices."""
    routers = find_routers(hf)
    return Routing(routers) if routers and ranks.size == 1 and not spec.model.compile else None


def load_hf(spec: LearnerSpec, device: torch.device, ranks: SequenceRanks, *, trained: bool) -> Any:
    """The checkpoint's model, in fp32 when it is to be trained; without dropout, unless it is asked for; as a reward model where
    one is trained.

    Raises:
        ConfigError: it can't be loaded or is not whole, or its sequences can't be split over ranks.
    """
    from transformers import AutoConfig

    path, code = spec.model_path, spec.model.trust_remote_code
    config: Any = None
    skeleton: Skeleton | None = None
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=code)
        if not spec.learner.dropout:
            without_dropout(config)
        check_trainable(config, path, reward_model=spec.is_reward_model)
        if spec.is_reward_model:
            config.num_labels = 1
        attention = _attention(spec, device)
        read = partial(_read, spec, config, attention)
        if can_shard(spec):
            make = partial(_make, spec, config, attention)
            skeleton = Skeleton(make, read, stored_dtype(path))
        if skeleton is None or not skeleton.fits:
            skeleton, hf = None, _read_whole(spec, read, trained=trained)
        else:
            hf = skeleton.hf
    except MAKING as e:
        raise ConfigError(f"the learner can't load model {path}: {why_not(e, config)}") from None
    use_ropes_of_each_sequence(hf)
    ranks.split_heads(hf)
    if trained and spec.model.lora is not None:
        inject(hf, spec.model.lora)
    if trained and spec.model.checkpoints(on_gpu=device.type == "cuda"):
        # ZeRO-3 releases weights between the passes, which non-reentrant checkpointing takes for changed tensors.
        hf.gradient_checkpointing_enable({"use_reentrant": spec.learner.zero_stage == 3})
        hf.enable_input_require_grads()
    if not spec.learner.dropout:
        without_noise(hf)
    use_faster_products(hf)
    if skeleton is not None:
        skeleton.fill(deepspeed_config(spec.model, spec.learner, device), spec.dtype, device)
    if spec.model.compile:
        compile_layers(hf)
    return hf


def _attention(spec: LearnerSpec, device: torch.device) -> str | None:
    """The `attn_implementation` of Transformers; None, its own choice, on the plain path unless flash-attention is asked for."""
    if spec.is_plain and spec.model.attention != FLASH:
        return None
    return choose_attention(spec.model.attention, device, spec.dtype)


def can_shard(spec: LearnerSpec) -> bool:
    """Whether each rank holds a part of every weight, and loads no more of it."""
    return spec.learner.zero_stage == 3


def _read_whole(spec: LearnerSpec, read: Callable[[torch.dtype], Any], *, trained: bool) -> Any:
    """The whole model in this rank's memory: in fp32 if it is to be trained and its files are not all in the compute dtype, to
    which it is only rounded once its masters are made. Adapters are made in the dtype of what they are beside, which is fp32."""
    dtype = spec.dtype
    if not trained:
        return read(dtype)
    if dtype == torch.float32 or spec.model.lora is not None or stored_dtype(spec.model_path) != dtype:
        return read(torch.float32)
    hf = read(dtype)
    return hf if exact_buffers(hf) else read(torch.float32)


def _auto(spec: LearnerSpec) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if spec.is_reward_model else AutoModelForCausalLM


def _read(spec: LearnerSpec, config: Any, attention: str | None, dtype: torch.dtype) -> Any:
    """The whole model, as its files have it; of a multimodal one the text model."""
    whole = whole_class(config, spec.model_path, reward_model=spec.is_reward_model)
    hf, missing = read_model(
        whole or _auto(spec),
        spec.model_path,
        reward_model=spec.is_reward_model,
        config=deepcopy(config),
        dtype=dtype,
        attn_implementation=None if whole else attention,
        trust_remote_code=spec.model.trust_remote_code,
    )
    if whole:
        return text_part(hf, spec.model_path, attention)
    if "score.weight" in missing:
        # Its initial values would be random, and different on every rank.
        torch.nn.init.zeros_(hf.score.weight)
    return hf


def _make(spec: LearnerSpec, config: Any, attention: str | None) -> Any:
    """The model by its config alone, in fp32."""
    if whole := whole_class(config, spec.model_path, reward_model=spec.is_reward_model):
        return text_part(empty_whole(whole, config), spec.model_path, attention)
    return _auto(spec).from_config(
        deepcopy(config),
        dtype=torch.float32,
        attn_implementation=attention,
        trust_remote_code=spec.model.trust_remote_code,
    )


def can_share_prompts(spec: LearnerSpec, hf: Any) -> bool:
    """Whether the prompts of a group are computed once for all of its sequences in a micro-batch; `hf` is an engine's Transformers
    model."""
    learner = spec.learner
    packed = learner.packing and hf.config._attn_implementation == PACKED
    # The positions of a prompt may depend on how long the sequence becomes.
    return learner.share_prompts and packed and learner.sequence_parallel_size == 1 and not has_ropes_by_length(hf)
