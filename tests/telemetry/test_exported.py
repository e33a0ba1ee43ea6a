"""Metrics as Prometheus sees them, and the dashboard that asks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grpo_ray.telemetry.catalogue import METRICS, matches, star
from grpo_ray.telemetry.prometheus import COUNTS, DISTRIBUTIONS, STEPS, exported, series

DASHBOARD = Path(__file__).parents[2] / "launch" / "grafana" / "grpo-ray.json"
PROMQL = {"sum", "by", "rate", "max", "avg", "histogram_quantile", "label_values", "le", "of", "run", "clamp_min"}


@pytest.mark.parametrize(
    ("metric", "name", "of"),
    [
        ("reward/mean", "grpo_reward_mean", ""),
        ("reward/accuracy/mean", "grpo_reward_mean", "accuracy"),
        ("reward/my_rewards.short/failed", "grpo_reward_failed", "my_rewards.short"),
        ("eval/accuracy", "grpo_eval_accuracy", ""),
        ("eval/aime/accuracy", "grpo_eval_accuracy", "aime"),
        ("eval/pass@8", "grpo_eval_pass_at", "8"),
        ("time/update", "grpo_time_update", ""),
        ("update/forward_backward_s", "grpo_update_s", "forward_backward"),
        ("rollout/0/tokens", "grpo_rollout", "0/tokens"),
        ("queue/reward", "grpo_queue", "reward"),
        ("groups/dropped/no_signal", "grpo_groups_dropped", "no_signal"),
        ("never/heard of", "grpo_never_heard_of", ""),
    ],
)
def test_a_metric_has_a_name_and_what_varies_is_a_label(metric: str, name: str, of: str) -> None:
    told = exported(metric)
    assert (told.name, told.of) == (name, of)


def test_every_name_is_one_that_prometheus_takes_and_is_meant_for_one_kind_of_metric() -> None:
    assert all(re.fullmatch(r"ray_grpo_[a-zA-Z0-9_]+", name) for name in series())
    gauges = {exported(pattern).name for pattern in METRICS}
    others = {c.name for c in (*COUNTS, STEPS)} | {d.name for d in DISTRIBUTIONS}
    assert gauges & others == set()
    assert len(others) == len(COUNTS) + 1 + len(DISTRIBUTIONS)


def test_what_is_counted_is_a_metric_of_a_step() -> None:
    for counted in (*COUNTS, STEPS, *DISTRIBUTIONS):
        assert counted.metric in METRICS
    assert star("groups/dropped/no_signal", "groups/dropped/*") == "no_signal"
    assert matches("reward/accuracy/failed", "reward/*/failed")


def queries() -> list[str]:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", [])]
    return panels + [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


def test_every_query_of_the_dashboard_names_a_metric_that_is_exported() -> None:
    asked = queries()
    assert len(asked) >= 20
    for query in asked:
        bare = re.sub(r"\{[^}]*\}|\"[^\"]*\"|\[[^\]]*\]|\$\w+", "", query)
        words = set(re.findall(r"[a-zA-Z_]\w*", bare)) - PROMQL
        assert words, query
        assert words <= series(), query


def test_the_dashboard_shows_one_run_at_a_time_and_its_panels_do_not_overlap() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        g = panel["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        for target in panel.get("targets", []):
            assert target["expr"].count('run="$run"') == target["expr"].count("ray_grpo_"), target["expr"]
            assert panel["datasource"]["uid"] == "$datasource"
