"""The one place where typed reports become metric names.

    Groups + UpdateReport + SyncReport + seconds  ->  {"reward/mean": 0.41, "time/update": 1.3, ...}

A figure without data in a step (no score was `ok`, no sample ended by itself) is left out, rather than written as 0.
A score that failed or does not apply has no part in any mean of rewards.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from grpo_ray.activity import Activity
from grpo_ray.evaluate import EvalResult
from grpo_ray.spread import has_spread
from grpo_ray.types import Group, Score, ScoreStatus, SyncReport, TimeSpan, UpdateReport

ROLES = ("rollout", "reward", "update", "sync", "log", "other", "eval", "checkpoint")
"""What a run's time can go to, in the order in which a step meets it."""

LOSSES = ("loss/sft", "loss/dpo", "loss/reward_model", "loss")
"""What a supervised run has one of."""

MAX_LOGGED = 200
"""Names of a step that reward functions may log: they can come from completions."""

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
    "reward/not_applicable": ("Samples to which no reward applies", "samples"),
    "reward/*/not_applicable": ("Samples to which function * does not apply", "samples"),
    "reward/busy_s": ("Time that the reward functions took, summed over workers", "s"),
    "completions/mean_length": ("Completion length, mean", "tokens"),
    "completions/min_length": ("Completion length, shortest", "tokens"),
    "completions/max_length": ("Completion length, longest", "tokens"),
    "completions/mean_terminated_length": ("Completion length, mean of those that ended by themselves", "tokens"),
    "completions/clipped_ratio": ("Part of the completions that were cut at max_completion_length", ""),
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
    "kl/ref": ("KL divergence from the reference model", "nats/token"),
    "kl/old": ("KL divergence from the policy at the start of the update, estimated", "nats/token"),
    "ratio/mean": ("Probability ratio of the policy to the one at the start of the update, mean over the tokens", ""),
    "clip/low": ("Part of the tokens whose ratio was clipped from below", ""),
    "clip/high": ("Part of the tokens whose ratio was clipped from above", ""),
    "entropy": (
        "Entropy of what is sampled from (over what top_p, top_k and min_p leave), at the sampled tokens",
        "nats/token",
    ),
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
    "throughput/learner_tflops": ("Model FLOPs of the update, of one learner (grpo_ray/flops.py)", "TFLOP/s"),
    "throughput/mfu": ("Model FLOPs of the update by the peak of the learners' devices", ""),
    "throughput/tokens_per_s": ("Completion tokens of the step by its whole time (SFT: all tokens)", "tokens/s"),
    "throughput/rollout_tokens_per_s": (
        "Completion tokens of the step by the time of their sampling: the wait for them, or the whole step when sampling ahead",
        "tokens/s",
    ),
    "throughput/samples_per_s": ("Samples of the step by its whole time", "samples/s"),
}
"""Name -> (what it is, unit). `*` stands for the name of a function, a reason or a figure."""


def describe(name: str) -> tuple[str, str]:
    """(what, unit) of a metric; a name that METRICS does not know describes itself."""
    if name in METRICS:
        return METRICS[name]
    for pattern, (what, unit) in METRICS.items():
        if "*" in pattern and matches(name, pattern):
            head, _, tail = pattern.partition("*")
            return what.replace("*", name[len(head) : len(name) - len(tail)]), unit
    return name, ""


def matches(name: str, pattern: str) -> bool:
    """Is this metric meant by the pattern? A `*` stands for one character or more."""
    head, star, tail = pattern.partition("*")
    if not star:
        return name == pattern
    return len(name) > len(head) + len(tail) and name.startswith(head) and name.endswith(tail)


def duration(seconds: float) -> str:
    """`5.8s`, `41s`, `4m41s`, `3h07m`: for people."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def step_metrics(
    groups: Sequence[Group],
    update: UpdateReport,
    sync: SyncReport | None,
    *,
    sampler_stats: Mapping[str, float],
    seconds: Mapping[str, float],
    dropped: Mapping[str, int],
    failed: Mapping[str, int],
    untrained: Mapping[str, str] | None = None,
    ahead: bool = False,
) -> dict[str, float]:
    """Everything that one step has to say, flat.

    Args:
        groups: the batch: P groups of G samples, scored, with advantages.
        update: its `step` is the policy version that was trained, the base of staleness; its metrics are taken as is.
        sync: None for a step without a transfer.
        sampler_stats: figures of the samplers; a name without a slash goes under `rollout/`.
        seconds: of `TimeKeeper.end_step()`.
        dropped: reason -> groups, while this batch was collected.
        failed: reward function -> scores that failed, dropped groups included.
        untrained: prompt id -> why nothing was learned from its group.
        ahead: samples may have been drawn before the wait for them began.
    """
    out = {
        **_reward_metrics(groups),
        **_completion_metrics(groups),
        "groups/count": float(len(groups)),
        "groups/dropped": float(sum(dropped.values())),
        **{f"groups/dropped/{reason}": float(n) for reason, n in dropped.items()},
        "reward/failed": float(sum(failed.values())),
        **{f"reward/{name}/failed": float(n) for name, n in failed.items()},
        **{f"groups/untrained/{why}": float(n) for why, n in Counter((untrained or {}).values()).items()},
        **{name if "/" in name else f"rollout/{name}": float(value) for name, value in sampler_stats.items()},
        **update.metrics,
        **{f"time/{phase}": s for phase, s in seconds.items()},
    }
    ages = [update.step - info.min_version for g in groups for info in g.samples]
    if ages:
        out |= {"staleness/mean": _mean(ages), "staleness/max": float(max(ages))}
    if sync is not None:
        out |= {
            "sync/pause_s": sync.pause_seconds,
            "sync/bytes": float(sync.num_bytes),
            "sync/engines": float(sync.num_engines),
        }
    num_tokens = sum(info.num_tokens for g in groups for info in g.samples)
    if seconds.get("step", 0) > 0:
        out["throughput/tokens_per_s"] = num_tokens / seconds["step"]
        out["throughput/samples_per_s"] = sum(len(g.samples) for g in groups) / seconds["step"]
    # Who samples ahead hardly waits, but samples all the while.
    sampling_s = seconds.get("step" if ahead else "rollout", 0.0)
    if sampling_s > 0:
        out["throughput/rollout_tokens_per_s"] = num_tokens / sampling_s
    return out


def eval_metrics(result: EvalResult, name: str = "") -> dict[str, float]:
    """Of one evaluation; `name` of its set where there are several."""
    prefix = f"eval/{name}" if name else "eval"
    out = {
        f"{prefix}/mean_length": result.mean_length,
        f"{prefix}/not_applicable": float(result.num_not_applicable),
        **{f"{prefix}/{name}": value for name, value in logged_metrics(result.scores).items()},
    }
    if result.accuracy is not None:
        out |= {
            f"{prefix}/accuracy": result.accuracy.mean,
            f"{prefix}/standard_error": result.accuracy.standard_error,
        }
    if result.mean_reward is not None:
        out[f"{prefix}/reward"] = result.mean_reward
    for measure, value in result.measures.items():
        out |= {f"{prefix}/{measure}": value.mean, f"{prefix}/standard_error/{measure}": value.standard_error}
    return out


def _reward_metrics(groups: Sequence[Group]) -> dict[str, float]:
    rewards: list[float] = []
    spreads: list[float] = []
    no_signal: list[bool] = []
    values_of: dict[str, list[float]] = {}
    silent: Counter[str] = Counter()
    busy_s = 0.0
    for group in groups:
        scored = [s for s in group.scores if s.status is ScoreStatus.OK]
        values = [s.value for s in scored]
        rewards += values
        if len(values) > 1:
            spreads.append(_std(values))
        no_signal.append(not has_spread(group))
        for part in [part for s in group.scores for part in s.parts]:
            busy_s += part.seconds
            of_part = values_of.setdefault(part.name, [])
            if part.status is ScoreStatus.OK:
                of_part.append(part.value)
            silent[part.name] += part.status is ScoreStatus.NOT_APPLICABLE
    unscored = sum(s.status is ScoreStatus.NOT_APPLICABLE for g in groups for s in g.scores)
    out = _mean_and_std("reward", rewards) | {"reward/not_applicable": float(unscored)}
    out |= {f"reward/{name}/not_applicable": float(n) for name, n in silent.items() if n}
    if spreads:
        out["reward/group_std"] = _mean(spreads)
    if no_signal:
        out["groups/no_signal_fraction"] = _mean(no_signal)
    for name, values in values_of.items():
        out |= _mean_and_std(f"reward/{name}", values)
    if values_of:
        out["reward/busy_s"] = busy_s
    return out | logged_metrics(score for group in groups for score in group.scores)


def logged_metrics(scores: Iterable[Score]) -> dict[str, float]:
    """`logged/NAME` of what reward functions logged: the mean over all values, as in TRL."""
    totals: dict[str, list[float]] = {}
    for name, *figures in (m for score in scores for part in score.parts for m in part.logged):
        so_far = totals.get(name, [0.0, 0, 0])
        totals[name] = [a + b for a, b in zip(so_far, figures, strict=True)]
    out = {}
    for name in sorted(totals)[:MAX_LOGGED]:
        total, count, not_finite = totals[name]
        if count:
            out[f"logged/{name}"] = total / count
        if not_finite:
            out[f"logged/{name}/not_finite"] = not_finite
    if len(totals) > MAX_LOGGED:
        out["logged_names_left_out"] = float(len(totals) - MAX_LOGGED)
    return out


def _completion_metrics(groups: Sequence[Group]) -> dict[str, float]:
    infos = [info for g in groups for info in g.samples]
    if not infos:
        return {}
    lengths = [info.num_tokens for info in infos]
    out = {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([info.finish_reason == "length" for info in infos]),
        "prompts/mean_length": _mean([info.num_prompt_tokens for info in infos]),
    }
    ended = [info.num_tokens for info in infos if info.finish_reason != "length"]
    if ended:
        out["completions/mean_terminated_length"] = _mean(ended)
    return out


def _mean_and_std(prefix: str, values: Sequence[float]) -> dict[str, float]:
    out = {}
    if values:
        out[f"{prefix}/mean"] = _mean(values)
    if len(values) > 1:
        out[f"{prefix}/std"] = _std(values)
    return out


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return math.fsum(items) / len(items)


def _std(values: Sequence[float]) -> float:
    """With n - 1, as torch.std and TRL's `reward_std`."""
    mean = _mean(values)
    return math.sqrt(math.fsum([(v - mean) ** 2 for v in values]) / (len(values) - 1))


@dataclass
class Span:
    """The time of one phase; final when the phase has ended."""

    seconds: float = 0.0


class TimeKeeper:
    """Where the time of a step went. A phase inside a phase is taken out of the outer one: parts add up to the whole.

    keeper.start_step()
    with keeper.phase("rollout"): ...
    keeper.end_step()  # {"rollout": 1.9, "other": 0.1, "step": 2.0}

    A phase between two steps (an evaluation, a checkpoint) is measured too, but belongs to no step: take its `Span`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, activity: Activity | None = None) -> None:
        """`activity`: gets each phase as a span."""
        self._clock = clock
        self._activity = activity or Activity("controller")
        self._open: list[float] = []
        """For each phase under way, the seconds of the phases inside it."""
        self._spent: dict[str, float] = {}
        self._began: float | None = None
        self._window_start = 0.0
        self.window = TimeSpan("step", 0.0, 0.0)
        """Of the last step that ended, on the clock of the tracks."""

    def start_step(self) -> None:
        self._spent = {}
        self._began = self._clock()
        self._window_start = time.time()

    @contextmanager
    def phase(self, name: str) -> Iterator[Span]:
        span = Span()
        began = self._clock()
        self._open.append(0.0)
        try:
            with self._activity.span(name):
                yield span
        finally:
            whole = self._clock() - began
            span.seconds = whole - self._open.pop()
            if self._open:
                self._open[-1] += whole
            self._spent[name] = self._spent.get(name, 0.0) + span.seconds

    def end_step(self) -> dict[str, float]:
        """Seconds by phase, `other` for what no phase covers, and `step` for the whole."""
        assert self._began is not None, "end_step without start_step"
        whole = self._clock() - self._began
        self._began = None
        self.window = TimeSpan("step", self._window_start, self._window_start + whole)
        return {**self._spent, "other": max(0.0, whole - sum(self._spent.values())), "step": whole}
