"""Tokens that leave the engine together: the samples are those of vLLM's own scheduler, in real engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actors.rollout.vllm_options import rollout_env
from grpo_ray.config.rollout import RolloutConfig

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
MAX_TOKENS = 60
BUNDLES: tuple[tuple[int, dict[str, Any]], ...] = ((256, {}), (7, {"engine": {"enable_prefix_caching": False}}))
"""The most tokens that wait, and options of rollout: one of them for vLLM itself."""


def drawn(model: Path, bundle: int | None, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """By vLLM's own scheduler, or by ours with so many tokens at most that wait."""
    command = [sys.executable, "-m", "tests.actors.rollout.bundled", str(model), str(MAX_TOKENS)]
    command += [] if bundle is None else [str(bundle), json.dumps(options)]
    env = dict(os.environ) | rollout_env(RolloutConfig(), on_gpu=False, backend="gloo") | {"TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def own(tiny_model: Path) -> dict[str, Any]:
    return drawn(tiny_model, None)


@pytest.mark.parametrize(("bundle", "options"), BUNDLES, ids=str)
def test_bundled_samples_are_those_of_vllms_scheduler_in_fewer_messages(
    own: dict[str, Any], tiny_model: Path, bundle: int, options: dict[str, Any]
) -> None:
    ours = drawn(tiny_model, bundle, options)
    assert own["cached"] == 32, "a block"
    assert ours["cached"] == (0 if options else 32), "the option of the engine is at work"
    assert ours["samples"] == own["samples"]
    lengths = {number: len(sample["tokens"]) for number, sample in own["samples"].items()}
    assert len(lengths) == 11, "one was aborted"
    assert ours["waiting"] == 0
    assert max(lengths.values()) == MAX_TOKENS
    assert own["messages"] == lengths
    assert ours["messages"] == {number: -(-length // bundle) for number, length in lengths.items()}


def drawn_ahead(model: Path, bundle: int | None) -> dict[str, Any]:
    """By the core that schedules the next step before this one is over, as on GPUs."""
    command = [sys.executable, "-m", "tests.actors.rollout.ahead", str(model), str(MAX_TOKENS)]
    command += [] if bundle is None else [str(bundle)]
    env = dict(os.environ) | rollout_env(RolloutConfig(), on_gpu=False, backend="gloo") | {"TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    told: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return told


def test_samples_are_bundled_where_steps_are_scheduled_ahead_and_a_pause_sends_what_waits(tiny_model: Path) -> None:
    own, ours = (drawn_ahead(tiny_model, bundle) for bundle in (None, 7))
    assert (own["scheduler"], ours["scheduler"]) == ("AsyncScheduler", "BundlingAsyncScheduler")
    assert own["ahead"] == ours["ahead"] == 2
    assert ours["samples"] == own["samples"]
    assert {number: len(s["tokens"]) for number, s in ours["samples"].items()} == {
        str(number): MAX_TOKENS - 3 * number for number in range(12) if number != 3
    }
    assert ours["waiting"] == 0
    assert len(ours["at_pauses"]) == 2
    for at_pause in ours["at_pauses"]:
        assert len(at_pause) > 4
        assert all(sampled == sent > 0 for sampled, sent in at_pause)
    assert ours["messages"] < own["messages"] / 4
