"""Advice, in one sentence, on where a run's time goes and which option would save some of it.

The model: a step is the controller's wait for samples plus what it then does one after the other:

    step = wait + serial,    serial = update + sync + log + other

Without sampling ahead (max_staleness 0) the rollout engines' work is in `wait`, the learner's in `update`, and each divides evenly
over its workers. With n workers of a role instead of m its part is m / n of what it was, and everything else takes as long as
before.

With sampling ahead both run at once, and the slowest path sets the pace.

    step >= max(sampling + sync, serial, scoring)        (engines are paused while weights are sent)

Both ignore what they cannot know: how uneven the work is (a worker that waits for the longest answer stays as it is), and that
smaller parts are less efficient. So a factor assumes even work: `at most` where it is a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

WORTH_TELLING = 1.10
"""The least factor worth reporting; below it a gain is lost in the noise of a run."""
STEPS_LOOKED_AT = 100
"""The number of last steps that are used: advice is for the run as it is now."""


@dataclass(frozen=True)
class StepTimes:
    """The times of a mean step."""

    step_s: float
    wait_s: float
    """The part of the step in which the controller did not have enough scored samples."""
    update_s: float
    sync_s: float
    log_s: float
    sampling_s: float
    """The time for which a rollout engine was busy, mean over engines; likewise below."""
    learning_s: float
    scoring_s: float
    scoring_alone_s: float
    """The time for which a reward worker was busy while neither a rollout engine nor a learner rank was."""
    num_samplers: int
    num_learners: int
    num_scorers: int
    max_staleness: int
    shared_devices: bool
    """Whether rollout engines and learner ranks share devices: what one gains by working at the same time, the other loses."""
    devices_per_sampler: int = 1

    @property
    def serial_s(self) -> float:
        return self.step_s - self.wait_s


@dataclass(frozen=True)
class Advice:
    text: str
    factor: float
    """The factor by which steps would be faster."""


def advise(times: StepTimes) -> Advice | None:
    """The change that saves most; None if nothing saves a tenth."""
    if times.step_s <= 0:
        return None
    best = max(_candidates(times), key=lambda a: a.factor, default=None)
    if best is not None and best.factor >= WORTH_TELLING:
        return best
    more = max(_more_workers(times), key=lambda a: a.factor, default=None)
    return more if more is not None and more.factor >= WORTH_TELLING else None


def step_model(times: StepTimes, *, ahead: bool, samplers: int = 0, learners: int = 0, scorers: int = 0) -> float:
    """The seconds of a step with so many workers (0: as many as now); see the top of this file."""
    t = times
    sampling = t.sampling_s * t.num_samplers / (samplers or t.num_samplers)
    update = t.update_s * t.num_learners / (learners or t.num_learners)
    fewer_scorers = t.num_scorers / (scorers or t.num_scorers)
    if ahead:
        return max(sampling + t.sync_s, t.serial_s - t.update_s + update, t.scoring_s * fewer_scorers)
    return t.step_s - t.sampling_s - t.update_s + sampling + update - t.scoring_alone_s * (1 - fewer_scorers)


def _candidates(t: StepTimes) -> Iterator[Advice]:
    """Changes that are possible with the present devices."""
    ahead = t.max_staleness > 0
    now = step_model(t, ahead=ahead)
    if not t.shared_devices:
        if not ahead:
            yield _overlap(t)
        yield from _moves(t, now, ahead=ahead)
    factor = now / step_model(t, ahead=ahead, scorers=2 * t.num_scorers)
    held_up = (
        f"samplers idle {_idle(t.sampling_s, t):.0%}" if ahead else f"{t.scoring_alone_s / t.step_s:.0%} of it alone"
    )
    yield Advice(
        f"reward workers busy {t.scoring_s / t.step_s:.0%} of the step, {held_up}: raise reward.num_actors "
        f"({t.num_scorers} -> {2 * t.num_scorers}): at most {_times(factor)}",
        factor,
    )
    for what, part, mend in (
        ("writing samples", replace(t, step_s=t.step_s - t.log_s, log_s=0.0), "tracking.rollouts=false would spare it"),
        (
            "sending weights",
            replace(t, step_s=t.step_s - t.sync_s, sync_s=0.0),
            "a larger prompts_per_step would share it among more samples",
        ),
    ):
        left = step_model(part, ahead=ahead)
        if left > 0:
            share = (t.step_s - part.step_s) / t.step_s
            yield Advice(f"{what} takes {share:.0%} of the step: {mend}: at most {_times(now / left)}", now / left)


def _overlap(t: StepTimes) -> Advice:
    factor = t.step_s / min(t.step_s, step_model(t, ahead=True))
    learners, samplers = _idle(t.learning_s, t), _idle(t.sampling_s, t)
    idle = f"learners idle {learners:.0%}" if learners > samplers else f"samplers idle {samplers:.0%}"
    slow = "sampling" if learners > samplers else "learning"
    return Advice(
        f"{idle} of the step, {slow} is the bottleneck: algorithm.max_staleness=1 would overlap them: at most {_times(factor)}",
        factor,
    )


def _moves(t: StepTimes, now: float, *, ahead: bool) -> Iterator[Advice]:
    """Every split of the devices over rollout engines and learner ranks."""
    size = t.devices_per_sampler
    devices = t.num_samplers * size + t.num_learners
    for samplers in range(1, (devices - 1) // size + 1):
        learners = devices - samplers * size
        if samplers == t.num_samplers:
            continue
        then = step_model(t, ahead=ahead, samplers=samplers, learners=learners)
        fewer, more = ("rollout", "learner") if samplers < t.num_samplers else ("learner", "rollout")
        idle = _idle(t.sampling_s if fewer == "rollout" else t.learning_s, t)
        who, slow = ("samplers", "the learner") if fewer == "rollout" else ("learners", "sampling")
        yield Advice(
            f"{who} idle {idle:.0%} of the step, {slow} is the bottleneck: move workers from {fewer} to {more} "
            f"(rollout.num_actors {t.num_samplers} -> {samplers}, learner.num_actors {t.num_learners} -> {learners}): "
            f"expected {_times(now / then)}",
            now / then,
        )


def _more_workers(t: StepTimes) -> Iterator[Advice]:
    """One worker more, on one more device, where nothing else helps."""
    if t.shared_devices:
        return
    ahead = t.max_staleness > 0
    now = step_model(t, ahead=ahead)
    for role, samplers, learners in (
        ("rollout", t.num_samplers + 1, t.num_learners),
        ("learner", t.num_samplers, t.num_learners + 1),
    ):
        then = step_model(t, ahead=ahead, samplers=samplers, learners=learners)
        seconds, what = (t.sampling_s, "sampling") if role == "rollout" else (t.update_s, "learning")
        count = samplers if role == "rollout" else learners
        yield Advice(
            f"{what} takes {seconds / t.step_s:.0%} of the step, and nothing idle could take it over: one worker more "
            f"({role}.num_actors={count}): expected {_times(now / then)}",
            now / then,
        )


def _idle(busy_s: float, t: StepTimes) -> float:
    return max(0.0, 1 - busy_s / t.step_s)


def _times(factor: float) -> str:
    return f"{factor:.1f}x"


# From a run's metrics


def mean_step(lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> StepTimes | None:
    """The mean of the last STEPS_LOOKED_AT lines of `metrics.jsonl`, without the first step of a run, which warms up.

    Args:
        config: `config.yaml`, or a dump of the `RunConfig`.

    Returns:
        None without a step that has the busy times of rollout engines and learner ranks.
    """
    told = [line for line in lines if all(_number(line.get(name)) for name in _NEEDED)]
    steady = told[1:] if len(told) > 1 else told
    steady = steady[-STEPS_LOOKED_AT:]
    if not steady:
        return None

    def mean(name: str) -> float:
        return sum(line[name] if _number(line.get(name)) else 0.0 for line in steady) / len(steady)

    def busy(role: str) -> float:
        return sum(float(line.get(f"busy/{role}") or 0.0) * float(line["time/step"]) for line in steady) / len(steady)

    rollout = config.get("rollout") or {}
    last = steady[-1]
    return StepTimes(
        step_s=mean("time/step"),
        wait_s=mean("time/rollout"),
        update_s=mean("time/update"),
        sync_s=mean("time/sync"),
        log_s=mean("time/log"),
        sampling_s=busy("rollout"),
        learning_s=busy("learner"),
        scoring_s=busy("reward"),
        scoring_alone_s=mean("reward/alone_s"),
        num_samplers=int(last["workers/rollout"]),
        num_learners=int(last["workers/learner"]),
        num_scorers=int(last.get("workers/reward") or 1),
        max_staleness=int((config.get("algorithm") or {}).get("max_staleness") or 0),
        shared_devices=bool(last.get("workers/shared")),
        devices_per_sampler=math.prod(int(rollout.get(f"{kind}_parallel_size") or 1) for kind in ("tensor", "data")),
    )


_NEEDED = (
    "time/step",
    "time/rollout",
    "time/update",
    "busy/rollout",
    "busy/learner",
    "workers/rollout",
    "workers/learner",
)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value
