"""Gates of a pipeline: each compares one metric of a stage with a bound, or with another stage's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grpo_ray.errors import ConfigError
from grpo_ray.pipeline.config import GateConfig
from grpo_ray.pipeline.plan import Plan
from grpo_ray.pipeline.record import Record

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    text: str
    """The comparison, e.g. `accuracy 61.2 of at least 0.5`."""
    passed: bool


def figures_of(plan: Plan, record: Record) -> dict[str, dict[str, float]]:
    """The metrics of each stage, including those of its model on held-out prompts."""
    out = {name: dict(stage.metrics) for name, stage in record.stages.items()}
    for stage in plan.stages:
        if stage.measures and stage.name in out:
            out[stage.measures] = out.get(stage.measures, {}) | out[stage.name]
    return out


def judge(gates: Sequence[GateConfig], own: Metrics, of: Mapping[str, Metrics]) -> list[Verdict]:
    """Judge the gates of a stage.

    Args:
        own: the metrics of the stage.
        of: stage -> metrics, of all that are done.

    Raises:
        ConfigError: there is no such metric.
    """
    return [verdict for gate in gates for verdict in _judge(gate, own, of)]


def _judge(gate: GateConfig, own: Metrics, of: Mapping[str, Metrics]) -> list[Verdict]:
    value = _figure(gate.metric, own)
    out = []
    if gate.at_least is not None:
        out.append(Verdict(f"{gate.metric} {value:.4g}, at least {gate.at_least:g}", value >= gate.at_least))
    if gate.at_most is not None:
        out.append(Verdict(f"{gate.metric} {value:.4g}, at most {gate.at_most:g}", value <= gate.at_most))
    if gate.not_below is not None:
        other = _figure(gate.metric, of.get(gate.not_below, {}))
        text = f"{gate.metric} {value:.4g}, {gate.not_below} has {other:.4g}"
        text += f" and it may be {gate.by:g} less" if gate.by else ""
        out.append(Verdict(text, value >= other - gate.by))
    return out


def _figure(metric: str, metrics: Metrics) -> float:
    if metric not in metrics:
        silent = metric.startswith("accuracy") and metrics.get("not_applicable") == 1
        why = ": the accuracy applies to none of the held-out samples" if silent else ""
        raise ConfigError(
            f"a gate asks for {metric!r}, which was not measured{why}; there are {', '.join(sorted(metrics)) or 'no figures'}"
        )
    return metrics[metric]
