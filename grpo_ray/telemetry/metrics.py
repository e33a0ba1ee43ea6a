"""Metrics from typed reports, named as in `catalogue.py`; no other place makes them.

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

from grpo_ray.spread import has_spread
from grpo_ray.telemetry.activity import Activity
from grpo_ray.telemetry.catalogue import MAX_LOGGED
from grpo_ray.telemetry.episode_metrics import episode_metrics
from grpo_ray.telemetry.measures import EvalResult
from grpo_ray.types import TRUNCATED, Group, Score, ScoreStatus, SyncReport, TimeSpan, UpdateReport


def duration(seconds: float) -> str:
    """A human-readable duration: `5.8s`, `41s`, `4m41s`, `3h07m`."""
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
    """All metrics of one step, as a flat dictionary.

    Args:
        groups: the batch, P groups of G samples, scored, with advantages.
        update: its metrics are taken as is; staleness is measured from the policy version that its step started with.
        sync: the report of the weight sync; None for a step without one.
        sampler_stats: figures of the rollout engines; a name without a slash goes under `rollout/`.
        seconds: the result of `TimeKeeper.end_step()`.
        dropped: reason -> groups, while this batch was collected.
        failed: reward function -> scores that failed, dropped groups included.
        untrained: prompt id -> the reason why nothing was learned from its group.
        ahead: whether samples may have been generated before the wait for them began.
    """
    out = {
        **_reward_metrics(groups),
        **_completion_metrics(groups),
        **episode_metrics(groups),
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
    oldest = [info.min_version for g in groups for info in g.samples if info.min_version is not None]
    ages = [update.step - 1 - version for version in oldest]
    if ages:
        out |= {"staleness/mean": _mean(ages), "staleness/max": float(max(ages))}
    if sync is not None:
        out |= {
            "sync/pause_s": sync.pause_seconds,
            "sync/bytes": float(sync.num_bytes),
            "sync/engines": float(sync.num_engines),
        }
    num_tokens = sum(info.num_sampled for g in groups for info in g.samples)
    if seconds.get("step", 0) > 0:
        out["throughput/tokens_per_s"] = num_tokens / seconds["step"]
        out["throughput/samples_per_s"] = sum(len(g.samples) for g in groups) / seconds["step"]
    # With sampling ahead there is hardly any wait, and sampling goes on all the time.
    sampling_s = seconds.get("step" if ahead else "rollout", 0.0)
    if sampling_s > 0:
        out["throughput/rollout_tokens_per_s"] = num_tokens / sampling_s
    return out


def eval_metrics(result: EvalResult, name: str = "") -> dict[str, float]:
    """The metrics of one evaluation; `name` is its set's where there are several."""
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
    if left_out := sum(s.status.failed and s.value != s.value for g in groups for s in g.scores):
        out["reward/dropped_samples"] = float(left_out)
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
    """The metrics `logged/NAME` of what reward functions logged: the mean over all values, as in TRL."""
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
    lengths = [info.num_sampled for info in infos]
    out = {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _mean([info.finish_reason in TRUNCATED for info in infos]),
        "prompts/mean_length": _mean([info.num_prompt_tokens for info in infos]),
    }
    ended = [info.num_sampled for info in infos if info.finish_reason not in TRUNCATED]
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
    """The standard deviation with n - 1, as torch.std and TRL's `reward_std`."""
    mean = _mean(values)
    return math.sqrt(math.fsum([(v - mean) ** 2 for v in values]) / (len(values) - 1))


@dataclass
class Span:
    """The time of one phase; final when the phase has ended."""

    seconds: float = 0.0


class TimeKeeper:
    """Timer of a step's phases. A phase inside a phase is subtracted from the outer one: parts add up to the whole.

    keeper.start_step()
    with keeper.phase("rollout"): ...
    keeper.end_step()  # {"rollout": 1.9, "other": 0.1, "step": 2.0}

    A phase between two steps (an evaluation, a checkpoint) is measured too, but belongs to no step: take its `Span`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, activity: Activity | None = None) -> None:
        """Create the timer; `activity` gets each phase as a span."""
        self._clock = clock
        self._activity = activity or Activity("controller")
        self._open: list[float] = []
        """For each open phase, the seconds of the phases inside it."""
        self._spent: dict[str, float] = {}
        self._began: float | None = None
        self._window_start = 0.0
        self.window = TimeSpan("step", 0.0, 0.0)
        """The time of the last step that ended, on the clock of the tracks."""

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
        """The seconds by phase, `other` for what no phase covers, and `step` for the whole."""
        assert self._began is not None, "end_step without start_step"
        whole = self._clock() - self._began
        self._began = None
        self.window = TimeSpan("step", self._window_start, self._window_start + whole)
        return {**self._spent, "other": max(0.0, whole - sum(self._spent.values())), "step": whole}
