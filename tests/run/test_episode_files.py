"""Episodes on disk: which tokens are whose, in the rollout log, a checkpoint's groups and the ledger; and ledgers of before."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from actors.rollout.sample import info_of
from grpo_ray.run.kept_groups import read_groups, write_groups
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.replay import read_batch
from grpo_ray.run.rollout_log import distinct_refs, read_rollouts, write_rollouts
from grpo_ray.telemetry.metrics import step_metrics
from grpo_ray.types import Group, Prompt, Sample, Score, ScoreStatus, UpdateReport, VersionSpan
from tests.batches import batch_of

SPANS = {0: (VersionSpan(6, 0, 2), VersionSpan(7, 4, 5)), 1: (), 2: (VersionSpan(7, 0, 6),)}
"""Of three completions of six tokens: two turns, nothing of the model's, and a single answer."""


@pytest.fixture
def group() -> Group:
    prompt = Prompt("set/0/7", [5, 6], "?", None, {})
    samples = [
        Sample(
            prompt.id,
            index,
            np.array(prompt.token_ids, np.int32),
            np.arange(6, dtype=np.int32) + 10 * index,
            np.full(6, -0.5, np.float32),
            spans,
            "context_overflow" if not spans else "stop",
            "",
        )
        for index, spans in SPANS.items()
    ]
    infos = [replace(info_of(s, "rollout-0", row), ref=samples) for row, s in enumerate(samples)]
    scores = [Score(ScoreStatus.OK, float(i)) for i in range(3)]
    return Group(prompt, 3, 7, infos, scores, advantages=[-1.0, 0.0, 1.0])


def test_a_sample_knows_how_many_tokens_the_model_wrote_and_by_which_version_the_oldest(group: Group) -> None:
    assert [(i.num_tokens, i.num_sampled, i.min_version) for i in group.samples] == [(6, 3, 6), (6, 0, None), (6, 6, 7)]
    assert group.min_version == 6


def test_the_rollout_log_says_which_tokens_are_whose_and_is_replayed(group: Group, tmp_path: Path) -> None:
    batch = batch_of([group], step=7)
    path = write_rollouts(tmp_path, 8, [group], batch, distinct_refs([group]), run_seed=1)
    rows = read_rollouts(path)
    assert [row["num_sampled"] for row in rows] == [3, 0, 6]
    assert rows[0]["versions"] == [{"version": 6, "start": 0, "end": 2}, {"version": 7, "start": 4, "end": 5}]
    got = read_batch(path).samples
    assert [(s.num_tokens, s.num_sampled) for s in got] == [(6, 3), (6, 0), (6, 6)]
    assert got[0].ref[got[0].row].versions == SPANS[0]


def test_groups_of_a_checkpoint_come_back_with_their_gaps(group: Group, tmp_path: Path) -> None:
    path = tmp_path / "groups.parquet"
    write_groups(path, [group], distinct_refs([group]))
    (kept,) = read_groups(path)
    ref = object()
    assert kept.infos(ref) == [replace(info, ref=ref) for info in group.samples]
    assert [s.versions for s in kept.samples] == list(SPANS.values())


def test_the_ledger_counts_the_models_tokens_apart(group: Group, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.dispatched([group])
    ledger.sampled(group)
    later = replace(group, prompt=replace(group.prompt, id="set/1/7"))
    assert ledger.last_lengths([later]) == {"set/1/7": 3.0}
    ledger.close()
    with closing(sqlite3.connect(path)) as db:
        assert list(db.execute("SELECT num_tokens, num_sampled, min_version FROM groups")) == [(18, 9, 6)]


def test_a_ledger_of_an_earlier_version_gets_the_column_and_keeps_its_rows(group: Group, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.dispatched([group])
    ledger.sampled(group)
    ledger.close()
    with closing(sqlite3.connect(path)) as db:
        db.execute("ALTER TABLE groups DROP COLUMN num_sampled")
        db.commit()
    again = Ledger(path)
    later = replace(group, prompt=replace(group.prompt, id="set/1/7"), order=4)
    assert again.last_lengths([later]) == {"set/1/7": 6.0}
    again.dispatched([later])
    again.sampled(later)
    again.trained([group, later], 8)
    assert [row.num_sampled for row in again.after(7)] == [None, 9]
    again.close()


def test_metrics_of_lengths_are_of_what_the_model_wrote(group: Group) -> None:
    report = UpdateReport(8, {}, 1.0)
    out = step_metrics(
        [group], report, None, sampler_stats={}, seconds={"step": 2.0, "rollout": 1.0}, dropped={}, failed={}
    )
    assert out["completions/mean_length"] == 3.0
    assert (out["completions/min_length"], out["completions/max_length"]) == (0.0, 6.0)
    assert out["completions/mean_terminated_length"] == 4.5
    assert out["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert (out["throughput/tokens_per_s"], out["throughput/rollout_tokens_per_s"]) == (4.5, 9.0)
    assert (out["staleness/mean"], out["staleness/max"]) == (0.5, 1.0)
