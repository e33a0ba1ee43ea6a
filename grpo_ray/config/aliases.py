"""The names of options in verl, TRL and OpenRLHF -> their names here, so that an unknown key is answered with the intended one.

A name stands under the shortest of its endings that means one thing: `rollout.n` is verl's `actor_rollout_ref.rollout.n` as well.
If a schema lacks the first target, the next one counts (`beta` of GRPO and of DPO).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grpo_ray.suggest import closest

GUESS_CUTOFF = 0.8
"""The smallest `difflib` ratio of a suggestion: `zero_stge` is `zero_stage` (0.95), `max_tokens` is not `max_actors` (0.7)."""
ELSEWHERE_CUTOFF = 0.9
"""The smallest ratio for an option of another section, where short words are alike by chance: `betas` (of Adam) and `beta` (of the
KL) are at 0.89."""
MAX_PLACES = 4

_BATCH = ("prompts_per_step", "examples_per_step")
_SAMPLES = " (prompts of a step; it trains on so many times rollout.num_generations samples)"
_TOKENS = " (tokens, not samples)"
_PARAMS = " (or algorithm: NAME, a preset)"
_STEPS = " (steps)"
_AT_ONCE = " (what an engine samples at once, in evaluations too)"
_ZERO = " (of DeepSpeed: 3 shares weights, gradients and optimizer, as FSDP does)"
_LENGTHS = ", after prompts of up to data.max_prompt_length"

ALIASES: dict[str, tuple[tuple[str, ...], str]] = {
    # Short forms that users type out of habit.
    "rollout.n": (("rollout.num_generations",), ""),
    "n": (("rollout.num_generations",), ""),
    "group_size": (("rollout.num_generations",), ""),
    "rollout.max_tokens": (("rollout.max_completion_length",), ""),
    "max_tokens": (("rollout.max_completion_length", "max_length"), ""),
    "max_new_tokens": (("rollout.max_completion_length",), ""),
    "lr": (("learner.learning_rate",), ""),
    "critic.lr": (("critic.learning_rate",), ""),
    "batch_size": (_BATCH, _SAMPLES),
    "micro_batch_size": (("learner.micro_batch_tokens",), _TOKENS),
    "epochs": (("num_epochs",), ""),
    "max_steps": (("num_steps",), ""),
    "model.name": (("model.path",), ""),
    "data.path": (("data.train.path",), ""),
    "reward.name": (("reward.functions",), ": [{name: NAME}]"),
    "gpus": (("learner.num_gpus",), " and rollout.num_gpus, for each actor"),
    "eval.n": (("eval.num_samples",), ""),
    "sample.n": (("sample.num_samples",), ""),
    # verl
    "val_kwargs.n": (("eval.num_samples",), ""),
    "val_kwargs.temperature": (("eval.temperature",), ""),
    "val_kwargs.top_p": (("eval.top_p",), ""),
    "response_length": (("rollout.max_completion_length",), ""),
    "max_response_length": (("rollout.max_completion_length",), ""),
    "prompt_length": (("data.max_prompt_length",), ""),
    "tensor_model_parallel_size": (("rollout.tensor_parallel_size",), ""),
    "train_batch_size": (_BATCH, _SAMPLES),
    "train_files": (("data.train.path",), ""),
    "val_files": (("data.eval.path", "data.eval"), ""),
    "prompt_key": (("data.train.columns",), ": {prompt: NAME}"),
    "train_max_samples": (("data.train.limit",), ""),
    "filter_overlong_prompts": (("data.long_prompts",), ": drop or error"),
    "truncation": (("data.long_prompts",), ": drop or error"),
    "apply_chat_template_kwargs": (("data.chat_template_kwargs",), ""),
    "ppo_mini_batch_size": (("algorithm.num_mini_batches",), " (how many of them a batch is split into)"),
    "ppo_micro_batch_size": (("learner.micro_batch_tokens",), _TOKENS),
    "ppo_micro_batch_size_per_gpu": (("learner.micro_batch_tokens",), _TOKENS),
    "log_prob_micro_batch_size_per_gpu": (("learner.micro_batch_tokens",), _TOKENS),
    "ppo_max_token_len_per_gpu": (("learner.micro_batch_tokens",), ""),
    "ppo_epochs": (("algorithm.num_iterations",), ""),
    "clip_ratio": (("algorithm.epsilon_low",), " and algorithm.epsilon_high"),
    "clip_ratio_low": (("algorithm.epsilon_low",), ""),
    "clip_ratio_high": (("algorithm.epsilon_high",), ""),
    "clip_ratio_c": (("algorithm.dual_clip_c",), ""),
    "cliprange_value": (("critic.value_clip_range",), ""),
    "entropy_coeff": (("algorithm.entropy_coef",), ""),
    "loss_agg_mode": (("algorithm.loss",), ": token-mean is dapo, seq-mean-token-mean grpo"),
    "loss_mode": (("algorithm.loss",), ""),
    "use_kl_loss": (("algorithm.beta",), " (above 0), with algorithm.kl_in loss"),
    "kl_loss_coef": (("algorithm.beta",), ", with algorithm.kl_in loss"),
    "kl_loss_type": (("algorithm.kl_estimator",), ": kl is k1, mse k2, low_var_kl k3"),
    "use_kl_in_reward": (("algorithm.kl_in",), ": reward, with algorithm.beta above 0"),
    "kl_penalty": (("algorithm.kl_estimator",), ": kl is k1, mse k2, low_var_kl k3"),
    "kl_coef": (("algorithm.beta",), ", with algorithm.kl_in reward"),
    "adv_estimator": (("algorithm.advantage",), _PARAMS),
    "norm_adv_by_std_in_grpo": (("algorithm.advantage",), ": grpo divides by it, dr_grpo does not"),
    "filter_groups": (("algorithm.dynamic_sampling",), ""),
    "rollout_is": (("algorithm.importance_sampling",), ""),
    "rollout_is_threshold": (("algorithm.importance_sampling_clip_max",), ""),
    "optim.lr": (("learner.learning_rate",), ""),
    "critic.optim.lr": (("critic.learning_rate",), ""),
    "critic.optim.lr_warmup_steps": (("critic.warmup_steps",), ""),
    "lr_warmup_steps": (("learner.warmup_steps",), ""),
    "lr_warmup_steps_ratio": (("learner.warmup_steps",), _STEPS),
    "warmup_style": (("learner.lr_scheduler_type",), ""),
    "grad_clip": (("learner.max_grad_norm",), ""),
    "ulysses_sequence_parallel_size": (("learner.sequence_parallel_size",), ""),
    "enable_rollout_routing_replay": (("rollout.keep_routing",), ""),
    "param_offload": (("learner.offload_params",), ""),
    "optimizer_offload": (("learner.offload_optimizer",), ""),
    "enable_gradient_checkpointing": (("model.gradient_checkpointing",), ""),
    "use_remove_padding": (("learner.packing",), ""),
    "custom_reward_function.path": (("reward.functions",), ": [{name: PATH.py:FUNCTION}]"),
    "custom_reward_function.name": (("reward.functions",), ": [{name: PATH.py:FUNCTION}]"),
    "reward_kwargs": (("reward.functions",), ": [{name: NAME, args: {..}}]"),
    "total_epochs": (("num_epochs",), ""),
    "total_training_steps": (("num_steps",), ""),
    "experiment_name": (("name",), ""),
    "project_name": (("tracking.project",), ""),
    "trainer.logger": (("tracking.wandb",), ", tracking.mlflow, tracking.tensorboard"),
    "n_gpus_per_node": (("learner.num_actors",), " and rollout.num_actors, one for each GPU"),
    "nnodes": (("cluster.address",), " (of a Ray cluster; actors go to the nodes that it has)"),
    "save_freq": (("checkpoint.every_steps",), ""),
    "test_freq": (("eval.every_steps",), ""),
    "default_local_dir": (("dir",), ""),
    "max_actor_ckpt_to_keep": (("checkpoint.keep",), ""),
    "max_critic_ckpt_to_keep": (("checkpoint.keep",), ""),
    "default_hdfs_dir": (("checkpoint.path",), ""),
    "rollout_data_dir": (("tracking.rollouts",), ""),
    "val_max_samples": (("data.eval.limit", "data.eval"), ""),
    "val_batch_size": (("rollout.max_num_seqs",), _AT_ONCE),
    "val_kwargs.do_sample": (("eval.temperature",), ": 0 is greedy"),
    "optim.betas": (("learner.adam_betas",), ": [BETA1, BETA2]"),
    "clip_grad": (("learner.max_grad_norm",), ""),
    "actor.strategy": (("learner.zero_stage",), _ZERO),
    "fsdp_size": (("learner.zero_stage",), _ZERO),
    "use_dynamic_bsz": (("learner.micro_batch_tokens",), " (batches are always made by tokens)"),
    "log_prob_micro_batch_size": (("learner.micro_batch_tokens",), _TOKENS),
    "log_prob_max_token_len_per_gpu": (("learner.micro_batch_tokens",), ""),
    "forward_max_token_len_per_gpu": (("learner.micro_batch_tokens",), ""),
    "max_model_len": (("rollout.max_completion_length",), _LENGTHS),
    "free_cache_engine": (("cluster.placement",), ": colocated"),
    "hybrid_engine": (("cluster.placement",), ": colocated"),
    "update_weights_bucket_megabytes": (("weights.bucket_mb",), ""),
    "custom_chat_template": (("data.template",), ": a Jinja file"),
    "max_num_gen_batches": (("algorithm.max_sampling_rounds",), ""),
    "rollout_rs": (("algorithm.geometric_mask",), ""),
    "rollout_rs_threshold": (("algorithm.geometric_mask",), ""),
    "bypass_mode": (("algorithm.old_logprobs",), ": rollout"),
    "reward_model.model.path": (("reward.functions",), ": [{name: reward_model, args: {path: ..}}]"),
    "reward_manager": (("reward.functions",), ": [{name: NAME}]"),
    "sandbox_fusion.url": (("reward.functions",), ": [{name: code}], with a sandbox of its own"),
    # TRL, and the TrainingArguments of Transformers
    "model_name_or_path": (("model.path",), ""),
    "dataset_name": (("data.train.path",), ""),
    "dataset_config": (("data.train.name",), ""),
    "dataset_train_split": (("data.train.split",), ""),
    "dataset_test_split": (("data.eval.split", "data.eval"), ""),
    "reward_funcs": (("reward.functions",), ": [{name: NAME}]"),
    "environment_factory": (
        ("environment.name",),
        ": my_game.Game, or environment.classes by the column `environment`",
    ),
    "max_tool_calling_iterations": (("environment.max_turns",), ", which counts the last answer too: one more"),
    "reward_weights": (("reward.functions",), ": [{name: NAME, weight: 0.5}]"),
    "per_device_train_batch_size": (_BATCH, _SAMPLES),
    "generation_batch_size": (_BATCH, _SAMPLES),
    "gradient_accumulation_steps": (("learner.micro_batch_tokens",), " (a step is split by tokens, by itself)"),
    "steps_per_generation": (("algorithm.num_mini_batches",), ""),
    "num_generations_eval": (("eval.num_samples",), ""),
    "num_train_epochs": (("num_epochs",), ""),
    "max_prompt_length": (("data.max_prompt_length",), ""),
    "vllm_mode": (("cluster.placement",), ": colocated or disaggregated"),
    "vllm_gpu_memory_utilization": (("rollout.gpu_memory_utilization",), ""),
    "engine_kwargs.vllm": (("rollout.engine",), ": {OPTION: VALUE}"),
    "engine_kwargs": (("rollout.engine",), ": {OPTION: VALUE}"),
    "vllm_tensor_parallel_size": (("rollout.tensor_parallel_size",), ""),
    "vllm_importance_sampling_correction": (("algorithm.importance_sampling",), ""),
    "vllm_importance_sampling_mode": (("algorithm.importance_sampling",), ""),
    "vllm_importance_sampling_clip_max": (("algorithm.importance_sampling_clip_max",), ""),
    "vllm_importance_sampling_clip_min": (("algorithm.importance_sampling_clip_min",), ""),
    "vllm_importance_sampling_cap": (("algorithm.importance_sampling_clip_max",), ""),
    "beta": (("algorithm.beta", "dpo.beta"), ""),
    "epsilon": (("algorithm.epsilon_low",), " and algorithm.epsilon_high"),
    "delta": (("algorithm.dual_clip_c",), ""),
    "loss_type": (("algorithm.loss", "dpo.loss", "reward_model.loss"), ""),
    "importance_sampling_level": (("algorithm.loss",), ": gspo has the ratio of a sequence, grpo of a token"),
    "scale_rewards": (("algorithm.advantage",), ": grpo (group), batch_std (batch), dr_grpo (none)"),
    "mask_truncated_completions": (("algorithm.mask_truncated",), ""),
    "sync_ref_model": (("algorithm.ref_refresh_steps",), " (above 0)"),
    "ref_model_sync_steps": (("algorithm.ref_refresh_steps",), ""),
    "ref_model_mixup_alpha": (("algorithm.ref_polyak_tau",), ""),
    "use_bias_correction_kl": (("algorithm.kl_estimator",), ": k3_unbiased"),
    "shuffle_dataset": (("data.shuffle",), ""),
    "adam_beta1": (("learner.adam_betas",), ": [BETA1, BETA2]"),
    "adam_beta2": (("learner.adam_betas",), ": [BETA1, BETA2]"),
    "adam_epsilon": (("learner.adam_eps",), ""),
    "warmup_ratio": (("learner.warmup_steps",), _STEPS),
    "bf16": (("model.dtype",), ": bfloat16 or float32"),
    "torch_dtype": (("model.dtype",), ": bfloat16 or float32"),
    "attn_implementation": (("model.attention",), ""),
    "use_peft": (("model.lora",), ": {r: 32}"),
    "lora_r": (("model.lora.r",), ""),
    "lora_alpha": (("model.lora.alpha",), ""),
    "lora_target_modules": (("model.lora.target_modules",), ""),
    "output_dir": (("dir",), ""),
    "run_name": (("name",), ""),
    "report_to": (("tracking.wandb",), ", tracking.mlflow, tracking.tensorboard"),
    "save_steps": (("checkpoint.every_steps",), ""),
    "save_total_limit": (("checkpoint.keep",), ""),
    "eval_steps": (("eval.every_steps",), ""),
    "log_completions": (("tracking.rollouts",), ""),
    "eval_strategy": (("eval.every_steps",), ""),
    "save_strategy": (("checkpoint.every_steps",), ""),
    "per_device_eval_batch_size": (("rollout.max_num_seqs",), _AT_ONCE),
    "vllm_max_model_length": (("rollout.max_completion_length",), _LENGTHS),
    "vllm_enable_sleep_mode": (("cluster.placement",), ": colocated"),
    "max_seq_length": (("max_length", "rollout.max_completion_length"), ""),
    "chat_template_path": (("data.template",), ": a Jinja file"),
    "dataloader_drop_last": (("data.last_batch",), ": drop"),
    "data_seed": (("seed",), ""),
    "fp16": (("model.dtype",), ": bfloat16 or float32"),
    "deepspeed": (("learner.deepspeed",), " (and learner.zero_stage)"),
    "torch_compile": (("model.compile",), ""),
    "use_torch_compile": (("model.compile",), ""),
    "fsdp": (("learner.zero_stage",), _ZERO),
    # OpenRLHF
    "pretrain": (("model.path",), ""),
    "prompt_data": (("data.train.path",), ""),
    "dataset": (("data.train.path",), ""),
    "prompt_split": (("data.train.split",), ""),
    "eval_split": (("data.eval.split", "data.eval"), ""),
    "chosen_key": (("data.train.columns",), ": {chosen: NAME}"),
    "rejected_key": (("data.train.columns",), ": {rejected: NAME}"),
    "eval_dataset": (("data.eval.path", "data.eval"), ""),
    "eval_temperature": (("eval.temperature",), ""),
    "eval_n_samples_per_prompt": (("eval.num_samples",), ""),
    "input_key": (("data.train.columns",), ": {prompt: NAME}"),
    "label_key": (("data.train.columns",), ": {answer: NAME}"),
    "input_template": (("data.template",), ""),
    "apply_chat_template": (("data.template",), ": chat"),
    "max_samples": (("data.train.limit",), ""),
    "prompt_max_len": (("data.max_prompt_length",), ""),
    "generate_max_len": (("rollout.max_completion_length",), ""),
    "max_len": (("max_length", "rollout.max_completion_length"), ""),
    "n_samples_per_prompt": (("rollout.num_generations",), ""),
    "rollout_batch_size": (_BATCH, _SAMPLES),
    "micro_train_batch_size": (("learner.micro_batch_tokens",), _TOKENS),
    "micro_rollout_batch_size": (("learner.micro_batch_tokens",), _TOKENS),
    "train_max_tokens_per_gpu": (("learner.micro_batch_tokens",), ""),
    "num_episodes": (("num_epochs",), ""),
    "max_epochs": (("algorithm.num_iterations", "num_epochs"), ""),
    "actor_learning_rate": (("learner.learning_rate",), ""),
    "critic_learning_rate": (("critic.learning_rate",), ""),
    "lr_scheduler": (("learner.lr_scheduler_type",), ""),
    "lr_warmup_ratio": (("learner.warmup_steps",), _STEPS),
    "l2": (("learner.weight_decay",), ""),
    "max_norm": (("learner.max_grad_norm",), ""),
    "adam_offload": (("learner.offload_optimizer",), ""),
    "use_dynamic_batch": (("learner.micro_batch_tokens",), " (batches are always made by tokens)"),
    "vllm_generate_batch_size": (("rollout.max_num_seqs",), _AT_ONCE),
    "vllm_sync_backend": (("weights.backend",), ""),
    "deepspeed_enable_sleep": (("cluster.placement",), ": colocated"),
    "actor_num_nodes": (("learner.num_actors",), " (all in all, on whatever nodes there are)"),
    "packing_samples": (("learner.packing",), ""),
    "ring_attn_size": (("learner.sequence_parallel_size",), ""),
    "init_kl_coef": (("algorithm.beta",), ""),
    "advantage_estimator": (("algorithm.advantage",), _PARAMS),
    "no_advantage_std_norm": (("algorithm.advantage",), ": dr_grpo"),
    "policy_loss_type": (("algorithm.loss",), ""),
    "entropy_loss_coef": (("algorithm.entropy_coef",), ""),
    "eps_clip": (("algorithm.epsilon_low",), " and algorithm.epsilon_high"),
    "eps_clip_low_high": (("algorithm.epsilon_low",), " and algorithm.epsilon_high"),
    "dual_clip": (("algorithm.dual_clip_c",), ""),
    "value_clip": (("critic.value_clip_range",), ""),
    "lambd": (("algorithm.lam",), ""),
    "dynamic_filtering": (("algorithm.dynamic_sampling",), ""),
    "enable_vllm_is_correction": (("algorithm.importance_sampling",), ""),
    "vllm_is_truncated_threshold": (("algorithm.importance_sampling_clip_max",), ""),
    "async_queue_size": (("algorithm.max_staleness",), ""),
    "async_train": (("algorithm.max_staleness",), " (above 0)"),
    "vllm_num_engines": (("rollout.num_actors",), ""),
    "actor_num_gpus_per_node": (("learner.num_actors",), ""),
    "colocate_all_models": (("cluster.placement",), ": colocated"),
    "vllm_enable_sleep": (("cluster.placement",), ": colocated"),
    "lora_rank": (("model.lora.r",), ""),
    "remote_rm_url": (("reward.functions",), ": [{name: MODULE.FUNCTION}], or judge with args base_url"),
    "reward_pretrain": (("reward.functions",), ": [{name: reward_model, args: {path: ..}}]"),
    "save_path": (("dir",), ""),
    "ckpt_path": (("checkpoint.path",), ""),
    "max_ckpt_num": (("checkpoint.keep",), ""),
    "use_wandb": (("tracking.wandb",), ""),
    "wandb_project": (("tracking.project",), ""),
    "wandb_run_name": (("name",), ""),
    "use_tensorboard": (("tracking.tensorboard",), ""),
}
"""Ending of a dotted name -> (options here, of which the first in a schema counts; an explanation)."""

_OF_ITSELF = "it is so of itself"
_CONSTANT = "a KL's weight is constant (algorithm.beta)"
_POLICY = "what is sampled is the policy itself, cut down by rollout.top_p, top_k and min_p"
_RESUME = "`grpo-ray resume RUN` goes on from the newest checkpoint of a run"
ABSENT: dict[str, str] = {
    "use_vllm": f"{_OF_ITSELF}: all samples are vLLM's",
    "rollout.name": "engines are vLLM's",
    "rollout.mode": "samples are asked for one by one, asynchronously",
    "do_sample": f"{_OF_ITSELF}; eval.temperature 0 is greedy",
    "vllm_server_host": "engines are actors of the cluster (rollout.num_actors)",
    "vllm_server_port": "engines are actors of the cluster (rollout.num_actors)",
    "vllm_server_base_url": "engines are actors of the cluster (rollout.num_actors)",
    "generation_kwargs": _POLICY,
    "repetition_penalty": _POLICY,
    "calculate_log_probs": f"{_OF_ITSELF}: every sample comes with its log-probabilities",
    "disable_dropout": f"{_OF_ITSELF}, unless learner.dropout is true",
    "logging_steps": f"{_OF_ITSELF}: every step is a line of metrics.jsonl",
    "val_before_train": f"{_OF_ITSELF}, where there is data.eval",
    "eval_on_start": f"{_OF_ITSELF}, where there is data.eval",
    "val_only": "`grpo-ray eval` measures without training",
    "balance_batch": f"{_OF_ITSELF}: batches are balanced by tokens",
    "kl_ctrl.type": _CONSTANT,
    "kl_ctrl.horizon": _CONSTANT,
    "target_kl": _CONSTANT,
    "kl_target": _CONSTANT,
    "kl_horizon": _CONSTANT,
    "resume_mode": _RESUME,
    "resume_from_path": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "load_checkpoint": _RESUME,
    "reward_fn_key": "a reward gets every column, data_source too",
    "optim": "it is AdamW",
    "ds_tensor_parallel_size": "learners share a model by learner.zero_stage, and a sequence by sequence_parallel_size",
}
"""Ending of a dotted name without an option here -> what to use instead."""


def called_here(key: str, known: Collection[str]) -> str | None:
    """The hint `rollout.n is called rollout.num_generations here` for `rollout.n`; None if no other project has this name.

    Args:
        key: a dotted name, or a flag such as `--actor-learning-rate`.
        known: every dotted key of the schema.
    """
    name = key.lstrip("-").replace("-", "_")
    parts = name.split(".")
    for start in range(len(parts)):
        ending = ".".join(parts[start:])
        targets, note = ALIASES.get(ending, ((), ""))
        if "." in ending and start > 0 and ending in known:
            targets, note = (ending,), ""
        target = next((t for t in targets if t in known), None)
        if target is not None and target != name:
            if target == "examples_per_step":
                note = ""
            return f"{key} is called {target} here{note}"
        if ending in ABSENT:
            return f"there is no option for {key} here: {ABSENT[ending]}"
    return None


def suggestion(key: str, known: Sequence[str], siblings: Sequence[str]) -> str:
    """The hint for an unknown key: its name here, the section that has an option of this name, or an option of similar spelling.

    Args:
        key: a dotted name.
        known: every dotted key of the schema.
        siblings: the names in its section.
    """
    if (called := called_here(key, known)) is not None:
        return called
    section, _, last = key.rpartition(".")
    places = _named(last, known)
    if len(places) == 1:
        return f"did you mean {places[0]}?"
    if places:
        more = ", .." * (len(places) > MAX_PLACES)
        return f"an option of this name is {', '.join(places[:MAX_PLACES])}{more}"
    close = closest(last, _spelt_alike(last, siblings), cutoff=GUESS_CUTOFF)
    if close is not None:
        return f"did you mean {f'{section}.{close}' if section else close}?"
    names = _spelt_alike(last, {k.rpartition(".")[2] for k in known})
    elsewhere = closest(last, names, cutoff=ELSEWHERE_CUTOFF)
    places = _named(elsewhere, known) if elsewhere is not None else []
    if len(places) == 1:
        return f"did you mean {places[0]}?"
    return "known here: " + ", ".join(siblings)


def _named(last: str, known: Sequence[str]) -> list[str]:
    """The options of this name. A critic shares some with the learner, and is only suggested if it was named."""
    places = [k for k in known if k.rpartition(".")[2] == last]
    return [k for k in places if not k.startswith("critic.")] or places


def _spelt_alike(name: str, others: Collection[str]) -> list[str]:
    """The similar names with as many words: a word more or less is another meaning, as in `load_checkpoint`, not a typo."""
    return [other for other in others if other.count("_") == name.count("_") or _joined(other) == _joined(name)]


def _joined(name: str) -> str:
    return name.replace("_", "")
