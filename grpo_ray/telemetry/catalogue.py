"""Catalogue of every metric of a run: its name, description and unit. A name that is not in METRICS is no metric."""

from __future__ import annotations

ROLES = ("rollout", "reward", "update", "sync", "log", "other", "eval", "checkpoint")
"""The activities that take a run's time, in the order in which a step meets them."""

LOSSES = ("loss/sft", "loss/dpo", "loss/reward_model", "loss")
"""The losses, of which a supervised run has one."""

MAX_LOGGED = 200
"""The most names that reward functions may log in a step, since they can come from completions."""

METRICS: dict[str, tuple[str, str]] = {
    "reward/mean": ("Reward: weighted sum of the functions, mean over the scored samples", ""),
    "reward/std": ("Reward: standard deviation over all scored samples of the step (n - 1)", ""),
    "reward/group_std": ("Reward: standard deviation within a group (n - 1), mean over groups", ""),
    "reward/*/mean": ("Reward function *: mean over the samples it applies to, before its weight", ""),
    "reward/*/std": ("Reward function *: standard deviation over those samples (n - 1)", ""),
    "logged/*/not_finite": ("Values of * that a reward function logged and that are no finite number", ""),
    "logged_names_left_out": (f"Names that reward functions logged beyond {MAX_LOGGED}", ""),
    "logged/*": ("Logged by a reward function: *, mean over its values", ""),
    "reward/kl_penalty": ("What the KL took off the reward of a sample, beta included, mean (kl_in reward)", ""),
    "reward/failed": ("Scores that failed (timeout, crash, error), dropped groups included", "scores"),
    "reward/*/failed": ("Scores of function * that failed", "scores"),
    "reward/dropped_samples": ("Samples of trained groups that were left out since their scores failed", "samples"),
    "reward/not_applicable": ("Samples to which no reward applies", "samples"),
    "reward/*/not_applicable": ("Samples to which function * does not apply", "samples"),
    "reward/busy_s": ("Time that the reward functions took, summed over workers", "s"),
    "completions/mean_length": ("Completion length, mean; of an episode what the model wrote", "tokens"),
    "completions/min_length": ("Completion length, shortest", "tokens"),
    "completions/max_length": ("Completion length, longest", "tokens"),
    "completions/mean_terminated_length": ("Completion length, mean of those that ended by themselves", "tokens"),
    "completions/clipped_ratio": ("Part of the completions that had no room for more tokens", ""),
    "environment/turns": ("Turns of the model in an episode, mean", "turns"),
    "environment/tool_calls": ("Tool calls in an episode, mean", "calls"),
    "environment/tool_calls/*": ("Calls of the tool * in an episode, mean", "calls"),
    "environment/errors": ("Tool calls that were answered with an error", "calls"),
    "environment/seconds": ("Time that an episode waits for its environment, mean", "s"),
    "environment/tokens": ("Tokens of an episode that are its environment's, mean", "tokens"),
    "environment/failed": (
        "Environments that failed (timeout, crash, error), those that were drawn again included",
        "episodes",
    ),
    "environment/failed/*": ("Environments that failed with status *", "episodes"),
    "environment/ended/*": ("Part of the episodes that ended by *", ""),
    "prompts/mean_length": ("Prompt length, mean", "tokens"),
    "groups/count": ("Groups in the batch", "groups"),
    "groups/no_signal_fraction": (
        "Part of the groups whose scores are all equal but for rounding: they say nothing of the task",
        "",
    ),
    "groups/dropped": ("Groups dropped while the batch was collected", "groups"),
    "groups/dropped/*": ("Groups dropped because of *", "groups"),
    "groups/untrained/*": ("Groups of the batch that nothing was learned from because of *", "groups"),
    "steps/without_signal": ("Steps in a row, up to this one, that had nothing to learn from", "steps"),
    "staleness/mean": ("Steps between a sample's oldest token and its training, mean", "steps"),
    "staleness/max": ("Steps between a sample's oldest token and its training, most", "steps"),
    "staleness/logp_shift": (
        "Tokens of older weights: mean |log-probability when sampled - of the policy at the start of the update|",
        "nats",
    ),
    "loss/policy": ("Policy objective (near 0 with one update per batch and no KL: watch reward and gradient)", ""),
    "loss/sft": ("Cross-entropy of the demonstrated tokens", "nats/token"),
    "loss/dpo": ("DPO or IPO loss of a pair, mean (0.69 where nothing is learnt yet)", ""),
    "loss/reward_model": ("Loss of the reward model, mean (0.69 where nothing is learnt yet)", ""),
    "pairs/accuracy": ("Part of the pairs whose chosen answer is ahead", ""),
    "pairs/margin": ("By how much the chosen answer is ahead, mean: scores, or beta x log-ratios", ""),
    "pairs/chosen": ("Score of the chosen answers, mean (DPO: beta x log-ratio to the reference)", ""),
    "pairs/rejected": ("Score of the rejected answers, mean (DPO: beta x log-ratio to the reference)", ""),
    "logps/chosen": ("Log-probability of a chosen answer, mean", "nats"),
    "logps/rejected": ("Log-probability of a rejected answer, mean", "nats"),
    "score/mean": ("Score that the reward model gives, mean", ""),
    "score/accuracy": ("Part of the answers on the right side of 0 by their label", ""),
    "score/error": ("|score - label|, mean", ""),
    "loss/kl": ("KL term of the loss, beta included", ""),
    "loss/entropy": ("Entropy bonus of the loss, its weight included", ""),
    "loss/router": ("Load-balancing loss of the routers, its coefficient included (the coefficient times k: even)", ""),
    "router/load_max": ("Tokens of a layer's fullest expert by the mean over experts, mean over layers (1: even)", ""),
    "router/load_entropy": ("Entropy of the experts that tokens take over its largest, mean over layers (1: even)", ""),
    "kl/ref": ("KL divergence from the reference model", "nats/token"),
    "kl/old": ("KL divergence from the policy at the start of the update, estimated", "nats/token"),
    "ratio/mean": ("Probability ratio of the policy to the one at the start of the update, mean over the tokens", ""),
    "clip/low": ("Part of the tokens whose ratio was clipped from below", ""),
    "clip/high": ("Part of the tokens whose ratio was clipped from above", ""),
    "entropy": (
        "Entropy of what is sampled from (over what top_p, top_k and min_p leave), at the sampled tokens",
        "nats/token",
    ),
    "critic/loss": ("Critic: squared error of its values, clipped, mean over the tokens", ""),
    "critic/value": ("Critic: value of a token, mean", ""),
    "critic/return": ("Critic: return that a token's value is fitted to, mean", ""),
    "critic/explained_variance": ("Critic: part of the returns' variance that its values explain", ""),
    "critic/grad_norm": ("Critic: gradient norm before clipping", ""),
    "grad_norm": ("Gradient norm before clipping", ""),
    "lr": ("Learning rate", ""),
    "mismatch/mean_abs": (
        "Sampler against learner, tokens of the same weights: mean |difference of log-probabilities| (rounding: float32 below "
        "0.001, bfloat16 below 0.1)",
        "nats",
    ),
    "mismatch/max_abs": (
        "Sampler against learner, tokens of the same weights: largest |difference of log-probabilities|",
        "nats",
    ),
    "mismatch/kl": ("Sampler against learner, tokens of the same weights: KL divergence, estimated", "nats/token"),
    "correction/mean_weight": ("Correction for the sampler: weight of a token's loss, mean", ""),
    "correction/ess": ("Correction for the sampler: effective part of the samples, (sum w)^2 / (n sum w^2)", ""),
    "correction/masked_tokens": ("Correction for the sampler: part of the tokens that it leaves out", ""),
    "correction/masked_sequences": ("Correction for the sampler: part of the sequences that it leaves out", ""),
    "eval/accuracy": ("Held-out accuracy (pass@1, mean over the samples of each prompt)", ""),
    "eval/pass@1": ("Held-out accuracy: the mean over the samples of each prompt", ""),
    "eval/pass@*": ("Held-out: the chance that * samples hold a right one", ""),
    "eval/cons@*": ("Held-out accuracy of the majority vote over * samples", ""),
    "eval/standard_error": ("Standard error of the held-out accuracy, over prompts", ""),
    "eval/standard_error/*": ("Standard error of the held-out *, over prompts", ""),
    "eval/reward": ("Held-out reward, mean over the samples that have one", ""),
    "eval/mean_length": ("Held-out completion length, mean", "tokens"),
    "eval/not_applicable": ("Held-out samples to which the accuracy does not apply; no measure counts them", "samples"),
    "eval/*/accuracy": ("Held-out accuracy on * (pass@1, mean over the samples of each prompt)", ""),
    "eval/*/mean_length": ("Held-out completion length on *, mean", "tokens"),
    "eval/*/not_applicable": ("Held-out samples on * to which the accuracy does not apply", "samples"),
    "eval/*": ("Held-out: *", ""),
    "time/step": ("One step, evaluation and checkpoint apart", "s"),
    "time/rollout": ("Waiting for samples (and their scores, which overlap)", "s"),
    "time/reward": ("Waiting for scores alone", "s"),
    "time/update": ("Learner: forward, backward, optimizer", "s"),
    "time/sync": ("Weights to the samplers", "s"),
    "time/log": ("Writing samples and metrics", "s"),
    "time/other": ("The rest of the step", "s"),
    "time/eval": ("Evaluation after the step", "s"),
    "time/checkpoint": ("Checkpoint after the step: what training waited for", "s"),
    "time/scale": ("Other learners before the step: what training waited for, their checkpoint apart", "s"),
    "checkpoint/background_s": ("Writing the checkpoint before, while training went on", "s"),
    "update/*_s": ("Learner: * on rank 0", "s"),
    "update/num_steps": ("Optimizer steps of the update", "steps"),
    "update/micro_batches": ("Micro-batches of the update on rank 0", ""),
    "update/dummies": ("Empty micro-batches that keep the ranks in step", ""),
    "update/imbalance": ("Tokens of the fullest rank by the mean over ranks (1: even)", ""),
    "tokens/trained": ("Completion tokens that took part in the loss", "tokens"),
    "tokens/processed": ("Tokens of the sequences that went through the learner, prompts included", "tokens"),
    "tokens/shared": ("Of these, prompt tokens that were not computed again", "tokens"),
    "sync/pause_s": ("Generation stood still for a sync", "s"),
    "sync/bytes": ("Weights sent to each engine", "bytes"),
    "sync/engines": ("Engines that took part in the sync", "engines"),
    "rollout/*": ("Samplers: *", ""),
    "queue/*": ("Samples that wait for a worker at this moment: *", "samples"),
    "under_way/*": ("Samples that workers have at this moment: *", "samples"),
    "alive/*": ("Workers that live at this moment: *", "workers"),
    "restarts/*": ("Workers that died and were replaced, since the run began: *", "workers"),
    "busy/rollout": ("Samplers at work (a request under way, not paused), part of the step, mean over them", ""),
    "busy/reward": ("Reward workers at work, part of the step, mean over them", ""),
    "busy/learner": ("Learner ranks at work (sending weights too), part of the step, mean over them", ""),
    "workers/*": ("Workers in the step: *", "workers"),
    "workers/shared": ("1: samplers and learners share devices, so that working at once wins them nothing", ""),
    "reward/alone_s": ("Scoring while no sampler and no learner was at work, mean over reward workers", "s"),
    "throughput/sampler_tokens_per_s": (
        "Completion tokens by the busy seconds of all samplers: of one of them",
        "tokens/s",
    ),
    "throughput/learner_tokens_per_s": (
        "Tokens through the learner (prompts too) by the seconds of its update",
        "tokens/s",
    ),
    "throughput/learner_tflops": ("Model FLOPs of the update, of one learner (grpo_ray/models/flops.py)", "TFLOP/s"),
    "throughput/mfu": ("Model FLOPs of the update by the peak of the learners' devices", ""),
    "throughput/tokens_per_s": ("Completion tokens of the step by its whole time (SFT: all tokens)", "tokens/s"),
    "throughput/rollout_tokens_per_s": (
        "Completion tokens of the step by the time of their sampling: the wait for them, or the whole step when sampling ahead",
        "tokens/s",
    ),
    "throughput/samples_per_s": ("Samples of the step by its whole time", "samples/s"),
}
"""Name -> (description, unit). `*` stands for the name of a function, a reason or a figure."""


def pattern_of(name: str) -> str | None:
    """The name or the family in METRICS that matches this metric; None if there is none."""
    return name if name in METRICS else next((p for p in METRICS if "*" in p and matches(name, p)), None)


def describe(name: str) -> tuple[str, str]:
    """The (description, unit) of a metric; a name that METRICS does not know describes itself."""
    pattern = pattern_of(name)
    if pattern is None:
        return name, ""
    what, unit = METRICS[pattern]
    return what.replace("*", star(name, pattern)), unit


def star(name: str, pattern: str) -> str:
    """The part of a metric's name that the `*` of its pattern matches."""
    head, has_star, tail = pattern.partition("*")
    return name[len(head) : len(name) - len(tail)] if has_star else ""


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern matches this metric. A `*` matches one character or more."""
    head, star, tail = pattern.partition("*")
    if not star:
        return name == pattern
    return len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
