"""Which options have an effect where, and which options of a config have none: no setting is ignored silently.

    not_looked_at(config, "sample")  ->  {"num_steps": "`grpo-ray sample` does not look at it", ..}
    without_effect(config, "train")  ->  {"eval.top_p": "eval.temperature is 0: the likeliest token is taken", ..}

Options that can never do anything together are refused by the schema itself. These here are reported, for recipes are shared and
resumed; of those typed on this command's own line the first kind is refused (`launch/run/effects.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel

from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.base import is_users
from grpo_ray.config.common import keys_in_order
from grpo_ray.config.reward import SHARED_POOL
from grpo_ray.config.rollout import ENGINE_ON_GPUS, RolloutConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError
from grpo_ray.object_store import is_url

LEARNING = "train sft dpo reward-model"
SAMPLING = "train sample eval"
SUPERVISED = "sft dpo reward-model"
ALL = f"{SAMPLING} {SUPERVISED}"

WHERE: dict[str, dict[str, str]] = {
    "": {
        "dir seed code_dir": ALL,
        "name": f"{LEARNING} sample",
        "num_steps num_epochs": LEARNING,
        "prompts_per_step": "train",
        "examples_per_step max_length": SUPERVISED,
    },
    "model": {
        "path tiny dtype trust_remote_code": ALL,
        "attention gradient_checkpointing compile": LEARNING,
        "lora": "train sft dpo",
    },
    "model.tiny": {
        "hidden_size num_layers num_heads num_kv_heads context intermediate_size words vocab_size seed": ALL,
    },
    "model.lora": {"r alpha target_modules": "train sft dpo", "transfer": "train"},
    "data": {
        "eval template system long_prompts chat_template_kwargs": ALL,
        "exclude_eval": f"{LEARNING} sample",
        "shuffle last_batch": LEARNING,
        "max_prompt_length": SAMPLING,
    },
    "data.train": {"path package name split args columns limit": ALL},
    "data.eval": {"path package name split args columns limit": ALL},
    "rollout": {
        "num_actors num_cpus num_gpus resources labels tensor_parallel_size data_parallel_size max_completion_length stop "
        "stop_token_ids max_num_seqs max_num_batched_tokens kv_cache_gb kv_cache_dtype quantization speculative "
        "gpu_memory_utilization enforce_eager num_threads env engine": SAMPLING,
        "min_actors max_actors num_generations temperature top_p keep_routing": "train",
        "top_k min_p": "train sample",
    },
    "rollout.speculative": {"model method num_tokens": SAMPLING},
    "reward": {
        "functions num_actors num_cpus resources labels timeout_s num_gpus unit memory_gb env": SAMPLING,
        "min_actors max_actors": "train",
    },
    "environment": {
        "name package args interface classes tools tool_parser template max_turns max_tool_calls max_turn_tokens max_result_chars "
        "reset_timeout_s step_timeout_s episode_timeout_s num_actors num_cpus resources labels num_envs envs_per_process "
        "memory_gb env": SAMPLING
    },
    "environment.classes": {"name package args interface": SAMPLING},
    "reward.on_failure": {"retries": SAMPLING, "action value": "train", "abort_above": "train sample"},
    "reward.functions": {"name package label weight args sources from_step part": SAMPLING},
    "reward.functions.workers": {"num_actors num_cpus num_gpus timeout_s": SAMPLING},
    "algorithm": {
        "preset package advantage gamma lam std_ddof std_eps loss epsilon_low epsilon_high dual_clip_c cispo_max_ratio "
        "sapo_temperature_pos sapo_temperature_neg entropy_coef beta kl_in kl_estimator ref_refresh_steps ref_polyak_tau "
        "old_logprobs importance_sampling importance_sampling_clip_min importance_sampling_clip_max geometric_mask "
        "off_policy_mask_threshold dynamic_sampling max_sampling_rounds mask_truncated num_iterations num_mini_batches "
        "max_staleness max_steps_without_signal": "train",
    },
    "learner": {
        "num_actors num_cpus num_gpus resources labels sequence_parallel_size zero_stage offload_optimizer offload_params "
        "learning_rate lr_scheduler_type min_lr_ratio warmup_steps weight_decay adam_betas adam_eps max_grad_norm "
        "micro_batch_tokens forward packing dropout router_aux_loss_coef logprob_chunk_tokens max_restarts num_threads "
        "env deepspeed": LEARNING,
        "share_prompts skip_no_signal overlap": "train",
    },
    "critic": {"learning_rate warmup_steps value_clip_range": "train"},
    "weights": {"backend bucket_mb keep_kv_cache": "train"},
    "deadlines": {"resources_s start_s sync_s": ALL, "sample_s": SAMPLING, "update_s save_s store_s": LEARNING},
    "checkpoint": {"path every_steps every_minutes keep export": LEARNING},
    # Pipelines use the last two to measure the output of a stage `sample`.
    "eval": {"every_steps": "train", "num_samples temperature top_p": "train eval", "accuracy threshold": SAMPLING},
    "sample": {"num_samples temperature top_p shard_prompts": "sample"},
    "tracking": {"tensorboard wandb mlflow prometheus project trace": LEARNING, "rollouts": "train"},
    "cluster": {"address num_cpus": ALL, "placement": "train"},
    "dpo": {"loss beta": "dpo"},
    "reward_model": {"loss use_margin": "reward-model"},
}  # fmt: skip
"""Section -> options -> the commands in which they have an effect. A new option is entered here."""

COMMANDS_OF = {
    f"{section}.{name}".lstrip("."): frozenset(commands.split())
    for section, options in WHERE.items()
    for names, commands in options.items()
    for name in names.split()
}


def not_looked_at(config: RunConfig | SftConfig, command: str) -> dict[str, str]:
    """Options that differ from their default but belong to other commands -> why they have no effect in this one."""
    return {
        key: f"`grpo-ray {command}` does not look at it" + _instead(key, command)
        for key, _ in _given(config)
        if command not in COMMANDS_OF.get(key, ALL.split())
    }


def without_effect(config: RunConfig | SftConfig, command: str) -> dict[str, str]:
    """Options that differ from their default but have no effect with the others of this config -> why."""
    given = dict(_given(config))
    found = {key: why for find in _FINDERS for key, why in find(config, command)}
    return {key: why for key, why in found.items() if key in given and command in COMMANDS_OF.get(key, ALL.split())}


def without_gpu(config: RunConfig | SftConfig) -> dict[str, str]:
    """Options that differ from their default but are for GPUs only -> why, on a cluster that has none."""
    of_gpus = {
        "rollout.gpu_memory_utilization": "there is no GPU; rollout.kv_cache_gb says how large the cache is",
        "learner.offload_optimizer": "there is no GPU whose memory it would spare",
        "learner.offload_params": "there is no GPU whose memory it would spare",
    }
    found = {key: of_gpus[key] for key, _ in _given(config) if key in of_gpus}
    engine = config.rollout.engine if isinstance(config, RunConfig) else {}
    if idle := sorted(engine.keys() & ENGINE_ON_GPUS):
        found["rollout.engine"] = f"on CPUs vLLM goes without {', '.join(idle)}"
    return found


def _instead(key: str, command: str) -> str:
    if command in ("eval", "sample") and key in ("rollout.temperature", "rollout.top_p", "rollout.num_generations"):
        return f"; it is {command}.{key.removeprefix('rollout.').replace('generations', 'samples')} there"
    return ""


def check_context(config: RunConfig | SftConfig, context: int) -> None:
    """Check that some sample can be as long as a given rollout.max_completion_length.

    Args:
        context: the model's context length in tokens, prompt included.

    Raises:
        ConfigError: no sample can be as long as the given rollout.max_completion_length.
    """
    if not isinstance(config, RunConfig):
        return
    asked = config.rollout.max_completion_length
    if asked < context or asked == RolloutConfig.model_fields["max_completion_length"].default:
        return
    room = max(1, context - min(config.data.max_prompt_length, context // 2))
    raise ConfigError(
        f"rollout.max_completion_length is {asked}, and the model's context is {context} tokens, prompt included: no sample can be "
        f"that long; lower it, e.g. to {room}"
    )


def about_context(config: RunConfig | SftConfig, context: int, longest_prompt: int = 0) -> str | None:
    """A one-line notice if the model's context is shorter than the options allow, else None.

    Args:
        longest_prompt: the number of tokens of the longest prompt in the data.
    """
    if isinstance(config, SftConfig):
        if config.max_length <= context:
            return None
        return (
            f"max_length is {config.max_length}, and the model's context is {context} tokens: what is longer is trained beyond it; "
            f"lower max_length to {context}"
        )
    asked, room = config.rollout.max_completion_length, context - longest_prompt
    if room >= asked:
        return None
    return (
        f"rollout.max_completion_length is {asked}, but the longest prompt has {longest_prompt} tokens and the model's context is "
        f"{context}: its samples are cut at {room}; lower max_completion_length to {room}"
        + (f", or data.max_prompt_length to {context - asked}" if asked < context else "")
    )


def _given(node: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each option that is not at its default. (A resolved config names every key.)"""
    for name in keys_in_order(type(node)):
        field = type(node).model_fields[name]
        value = getattr(node, name)
        if value is not None and field.default is None:
            yield prefix + name, value
        if isinstance(value, BaseModel):
            yield from _given(value, f"{prefix}{name}.")
        elif field.default is not None and value != field.get_default(call_default_factory=True):
            yield prefix + name, value


Found = Iterator[tuple[str, str]]


def _of_steps(config: RunConfig | SftConfig, _command: str) -> Found:
    if config.num_steps is not None:
        yield "num_epochs", f"num_steps is given ({config.num_steps}); num_steps=null lets num_epochs decide"
        yield "data.last_batch", f"it is about the end of num_epochs, and num_steps is given ({config.num_steps})"
    learner = config.learner
    if learner.lr_scheduler_type != "cosine_with_min_lr":
        yield (
            "learner.min_lr_ratio",
            f"it is of cosine_with_min_lr, and lr_scheduler_type is {learner.lr_scheduler_type}",
        )
    if learner.forward == "plain":
        yield "learner.packing", "on the plain path (learner.forward) every sequence is padded"
        yield "learner.share_prompts", "on the plain path (learner.forward) sequences share no prompt"
    elif not learner.packing:
        yield "learner.share_prompts", "sequences that are padded (packing false) share no prompt"
    elif learner.sequence_parallel_size > 1:
        yield "learner.share_prompts", "sequences that several learners share (sequence_parallel_size) share no prompt"


def _of_tracking(config: RunConfig | SftConfig, _command: str) -> Found:
    if not (config.tracking.wandb or config.tracking.mlflow):
        yield "tracking.project", "it is of tracking.wandb and tracking.mlflow, and both are off"
    if config.cluster.address is not None:
        yield "cluster.num_cpus", "it is of a cluster started here, and cluster.address joins one"
    if config.checkpoint.path is None or not is_url(config.checkpoint.path):
        yield "deadlines.store_s", "it is of an object store, and checkpoint.path names none"
    if config.model.tiny is not None:
        yield "model.trust_remote_code", "a tiny model has no code of its own"


def _of_data(config: RunConfig | SftConfig, command: str) -> Found:
    if config.data.eval is None:
        yield "data.exclude_eval", "there is no data.eval"
    elif command == "sft" and not config.data.exclude_eval:
        yield "data.eval", "fine-tuning measures nothing on it, and data.exclude_eval is off"
    elif command == "sample" and not config.data.exclude_eval:
        yield "data.eval", "`grpo-ray sample` takes data.train, and data.exclude_eval is off"


def _of_evaluation(config: RunConfig | SftConfig, command: str) -> Found:
    if not isinstance(config, RunConfig):
        return
    if config.data.eval is None and command == "train":
        for name in ("every_steps", "num_samples", "temperature", "top_p", "accuracy", "threshold"):
            yield f"eval.{name}", "there is no data.eval to measure on"
    for section, temperature in (("eval", config.eval.temperature), ("sample", config.sample.temperature)):
        if temperature == 0:
            yield f"{section}.top_p", f"{section}.temperature is 0: the likeliest token is taken"
            yield f"{section}.num_samples", f"{section}.temperature is 0: all samples of a prompt are the same"
    if command == "sample" and config.sample.temperature == 0:
        for name in ("top_k", "min_p"):
            yield f"rollout.{name}", "sample.temperature is 0: the likeliest token is taken"


def _of_workers(config: RunConfig | SftConfig, command: str) -> Found:
    if not isinstance(config, RunConfig):
        return
    if config.rollout.kv_cache_gb is not None:
        yield "rollout.gpu_memory_utilization", "rollout.kv_cache_gb says how large the cache is"
    if not config.algorithm.max_staleness:
        yield "weights.keep_kv_cache", "algorithm.max_staleness is 0: no sample is in progress when weights arrive"
    reward = config.reward
    if command == "train" and config.num_steps is not None:
        late = ", ".join(f.title for f in reward.functions if f.from_step >= config.num_steps)
        if late:
            yield (
                "reward.functions",
                f"{late} would begin after the last step (from_step), for num_steps is {config.num_steps}",
            )
    if SHARED_POOL not in config.reward_pools:
        for name in ("num_actors", "min_actors", "max_actors", "num_cpus", "num_gpus", "unit"):
            yield f"reward.{name}", "every reward function has workers of its own"
    if reward.on_failure.action != "value":
        yield (
            "reward.on_failure.value",
            "it is of action value, and reward.on_failure.action is " + reward.on_failure.action,
        )


def _of_the_loss(config: RunConfig | SftConfig, _command: str) -> Found:
    if not isinstance(config, RunConfig):
        return
    a = config.algorithm
    if a.advantage in ("dr_grpo", "rloo", "gae"):
        for name in ("std_ddof", "std_eps"):
            yield f"algorithm.{name}", f"advantage {a.advantage} divides by no standard deviation"
    on_policy = a.num_iterations * a.num_mini_batches == 1 and a.max_staleness == 0 and a.old_logprobs == "recompute"
    if on_policy and not is_users(a.loss):
        usual = AlgorithmConfig.model_validate({"preset": a.preset, "loss": a.loss})
        bounds = ["epsilon_low", "epsilon_high", "dual_clip_c", "sapo_temperature_pos", "sapo_temperature_neg"]
        for name in bounds + ["cispo_max_ratio"] * (a.cispo_max_ratio >= 1):
            if getattr(a, name) != getattr(usual, name):
                yield f"algorithm.{name}", "with one update a batch the ratio is 1, which nothing clips"


_FINDERS: tuple[Callable[[RunConfig | SftConfig, str], Found], ...] = (
    _of_steps,
    _of_tracking,
    _of_data,
    _of_evaluation,
    _of_workers,
    _of_the_loss,
)
