"""The smallest recipe of a run, for tests of what options do."""

from __future__ import annotations

from typing import Any

from grpo_ray.config.loading import build, deep_merge, parse_overrides
from grpo_ray.config.schema import RunConfig

RL: dict[str, Any] = {
    "model": {"tiny": {}},
    "data": {"train": {"path": "rows.jsonl"}},
    "reward": {"functions": [{"name": "accuracy"}]},
}


def run_config(*overrides: str) -> RunConfig:
    """Of RL with `key=value` overrides."""
    return build(RunConfig, deep_merge(RL, parse_overrides(list(overrides))), "test")
