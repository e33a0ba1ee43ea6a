"""Whole runs, and a replayed step of each, where the advantage is more than one number of the loop's: rewards of steps, and a KL
in the reward, which the learner makes advantages of."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from grpo_ray.run.rollout_log import read_rollouts
from tests.end_to_end.runs import LIMIT_S, metrics, run, train, write_recipe

pytestmark = [pytest.mark.timeout(3 * LIMIT_S), pytest.mark.slow]
KEPT = ["num_steps=3", "checkpoint.every_steps=1", "checkpoint.keep=3", "checkpoint.export=false"]


def rows_of_replayed_run(
    tmp_path: Path, name: str, *overrides: str
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The metrics of a run whose last step was repeated bit for bit, and the samples of that step."""
    args, run_dir = train(write_recipe(tmp_path), name, *KEPT, *overrides)
    code, output = run(*args)
    assert code == 0, output
    code, output = run("replay", str(run_dir), "--step", "3")
    assert code == 0, output
    assert len(re.findall(r"(loss/policy|grad_norm) .*the same bits", output)) == 2, output
    lines = metrics(run_dir)
    assert all(line["grad_norm"] > 0 for line in lines)
    return lines, read_rollouts(run_dir / "rollouts" / "step-000003.parquet")


def test_a_run_with_process_supervision_trains_on_the_steps_and_replays(tmp_path: Path) -> None:
    functions = "[{name: tests.end_to_end.rewards.digits_by_half}, {name: tests.end_to_end.rewards.share_of_digits, weight: 0.5}]"
    lines, rows = rows_of_replayed_run(
        tmp_path,
        "process",
        "algorithm.advantage=process",
        "algorithm.mask_truncated=true",
        f"reward.functions={functions}",
    )
    for number in range(4):
        group = [row for row in rows if row["group"] == number]
        steps = []
        for row in group:
            halves, outcome = row["rewards"]
            last = len(row["completion_ids"]) - 1
            own = {s["end"]: s["value"] for s in halves["steps"]} or {last: halves["value"]}
            own[last] += 0.5 * outcome["value"]
            assert halves["value"] == pytest.approx(sum(s["value"] for s in halves["steps"]))
            assert row["reward"] == pytest.approx(sum(own.values()))
            steps.append(own)
        pooled = [value for own in steps for value in own.values()]
        mean, std = statistics.fmean(pooled), statistics.stdev(pooled) + 1e-4
        for row, own in zip(group, steps, strict=True):
            want = {end: sum((v - mean) / std for e, v in own.items() if e >= end) for end in own}
            assert {s["end"]: s["value"] for s in row["advantage_steps"]} == pytest.approx(want, abs=1e-9)
    assert lines[2]["reward/mean"] == pytest.approx(statistics.fmean(row["reward"] for row in rows))
    assert lines[2]["tokens/trained"] == sum(len(row["completion_ids"]) for row in rows if row["loss_mask"])


def test_a_run_with_rloos_kl_in_the_reward_goes_off_the_scores_and_replays(tmp_path: Path) -> None:
    lines, rows = rows_of_replayed_run(tmp_path, "kl", "algorithm={preset: rloo, beta: 0.05, kl_in: reward}")
    assert lines[0]["reward/kl_penalty"] == pytest.approx(0, abs=1e-6)
    for line, size in zip(lines, ("none", "some", "some"), strict=True):
        tokens = 16 * line["completions/mean_length"]
        assert line["reward/kl_penalty"] == pytest.approx(0.05 * line["kl/ref"] * tokens / 16, rel=1e-6, abs=1e-9)
        assert size == "none" or abs(line["kl/ref"]) > 1e-5
        assert "loss/kl" not in line
    assert [row["advantage"] for row in rows] == [row["reward"] for row in rows]
    assert lines[2]["reward/mean"] == pytest.approx(statistics.fmean(row["reward"] for row in rows))
