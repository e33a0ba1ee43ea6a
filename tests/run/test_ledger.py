"""The ledger: no prompt is lost or trained twice, whatever happens in between."""

from __future__ import annotations

import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.run.ledger import Ledger
from grpo_ray.types import Group, Prompt, SampleInfo, Score, ScoreStatus


def group(order: int, reward: float = 1.0, version: int = 0) -> Group:
    prompt = Prompt(id=f"data/0/{order}", token_ids=[1], text="", messages=None, columns={})
    info = SampleInfo(prompt.id, 0, 1, 5, version, "stop", "rollout-0", ref=None, row=0)
    return Group(
        prompt=prompt,
        order=order,
        dispatched_version=version,
        samples=[info],
        scores=[Score(ScoreStatus.OK, reward)],
        advantages=[0.0],
    )


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    book = Ledger(tmp_path / "ledger.sqlite")
    yield book
    book.close()


def test_a_group_goes_from_dispatched_to_trained(ledger: Ledger) -> None:
    g = group(0)
    ledger.dispatched([g])
    ledger.sampled(g)
    ledger.trained([g], step=1)
    assert ledger.rows() == [("data/0/0", 0, "trained", 1, None)]


def test_a_trained_group_that_nothing_was_learned_from_says_why(ledger: Ledger) -> None:
    groups = [group(i) for i in range(3)]
    ledger.dispatched(groups)
    for g in groups:
        ledger.sampled(g)
    ledger.trained(groups, 1, {"data/0/0": "not_applicable", "data/0/2": "no_signal"})
    assert [row[2:] for row in ledger.rows()] == [
        ("trained", 1, "not_applicable"),
        ("trained", 1, None),
        ("trained", 1, "no_signal"),
    ]
    summary = ledger.summary()
    assert (summary.trained, summary.dropped, summary.drop_reasons) == (3, 0, {})
    assert summary.nothing_learned == {"not_applicable": 1, "no_signal": 1}


def test_a_prompt_can_not_be_dispatched_twice(ledger: Ledger) -> None:
    ledger.dispatched([group(0)])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.dispatched([group(0)])


def test_a_group_can_not_be_trained_twice_or_before_it_is_sampled(ledger: Ledger) -> None:
    g = group(0)
    ledger.dispatched([g])
    with pytest.raises(AssertionError, match="data/0/0"):
        ledger.trained([g], step=1)
    ledger.sampled(g)
    ledger.trained([g], step=1)
    with pytest.raises(AssertionError, match="data/0/0"):
        ledger.trained([g], step=2)


def test_a_step_is_recorded_whole_or_not_at_all(ledger: Ledger) -> None:
    a, b = group(0), group(1)
    ledger.dispatched([a, b])
    ledger.sampled(a)
    with pytest.raises(AssertionError):
        ledger.trained([a, b], step=1)
    assert [row[2] for row in ledger.rows()] == ["sampled", "dispatched"]


def test_the_mean_reward_leaves_failed_scores_out(ledger: Ledger) -> None:
    g = group(0, reward=1.0)
    g.samples = g.samples * 2
    g.scores = [Score(ScoreStatus.OK, 1.0), Score(ScoreStatus.TIMEOUT, float("nan"))]
    ledger.dispatched([g])
    ledger.sampled(g)
    ledger.flush()
    (row,) = ledger._db.execute("SELECT mean_reward, num_failed_scores FROM groups").fetchall()
    assert row == (1.0, 1)


@settings(max_examples=40, deadline=None)
@given(
    fates=st.lists(st.sampled_from(["dispatched", "sampled", "trained", "dropped"]), min_size=1, max_size=24),
    per_step=st.integers(1, 5),
    back_to=st.integers(0, 6),
    back_order=st.integers(0, 30),
)
def test_rolling_back_and_doing_it_again_gives_the_same_ledger(
    fates: list[str], per_step: int, back_to: int, back_order: int
) -> None:
    def play(ledger: Ledger, orders: range) -> None:
        for order in orders:
            g, step = group(order), order // per_step + 1
            ledger.dispatched([g])
            if fates[order] == "dispatched":
                continue
            ledger.sampled(g)
            if fates[order] == "trained":
                ledger.trained([g], step)
            elif fates[order] == "dropped":
                ledger.dropped(g, step, "reward_timeout")

    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "a.sqlite")
        play(ledger, range(len(fates)))
        before = ledger.rows()
        ledger.roll_back(back_to, back_order)
        kept = ledger.rows()
        assert all(step is not None and step <= back_to and order < back_order for _, order, *_, step, _ in kept)
        known = {row[1] for row in kept}
        for order in (o for o in range(len(fates)) if o not in known):
            play(ledger, range(order, order + 1))
        assert ledger.rows() == before
        summary = ledger.summary()
        assert summary.trained + summary.dropped + summary.in_flight == len(fates)
        ledger.close()


def test_options_that_a_resume_changed_are_noted_with_their_step(ledger: Ledger) -> None:
    ledger.changed(7, {"learner.learning_rate": (1e-3, 5e-4), "rollout.env": ({}, {"A": "b"})})
    ledger.changed(9, {"log_every": (1, None)})
    noted = ledger._db.execute("SELECT step, option, before, after, at FROM changes ORDER BY step, option").fetchall()
    assert [row[:4] for row in noted] == [
        (7, "learner.learning_rate", "0.001", "0.0005"),
        (7, "rollout.env", "{}", "{'A': 'b'}"),
        (9, "log_every", "1", "None"),
    ]
    assert all(abs(row[4] - time.time()) < 600 for row in noted)
