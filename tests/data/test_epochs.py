"""What becomes of the last prompts of a run that is given in epochs: every one is trained once, or it is said which is not."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.data.epochs import describe, run_length
from grpo_ray.errors import ConfigError, RewardError
from grpo_ray.loop.sft_loop import SftLoop, sft_batch
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import MessageEvent, StepEvent
from grpo_ray.types import Score, ScoreRequest, ScoreStatus, TrainerState
from tests.loop.test_sft_loop import Learner
from tests.loop.test_sft_loop import Rows as Examples
from tests.loop.test_train_loop import Rows, Session, config


def epochs(*overrides: str, size: int = 4, number: str = "1", last: str = "short") -> RunConfig:
    return config(
        "num_steps=null",
        f"prompts_per_step={size}",
        f"num_epochs={number}",
        f"data.last_batch={last}",
        "reward.on_failure.abort_above=1",
        "tracking.trace=false",
        *overrides,
    )


def supervised(size: int, number: float, last: str) -> SftConfig:
    data: dict[str, Any] = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "x"}, "last_batch": last},
        "examples_per_step": size,
        "num_epochs": number,
        "tracking": {"trace": False},
    }
    return build(SftConfig, data, "test")


@pytest.mark.parametrize(
    ("rows", "size", "number", "last", "steps", "trained", "text"),
    [
        (10, 4, "1", "short", 3, 10, "10 prompts, 1 epoch: 3 steps, the last of 2 prompts"),
        (10, 4, "1", "wrap", 3, 12, "3 steps of 4, the last with 2 prompts of the epoch after, trained once too"),
        (10, 4, "1", "drop", 2, 8, "10 prompts, 1 epoch: 2 steps of 4, without the last 2 prompts"),
        (3, 4, "1", "short", 1, 3, "3 prompts, 1 epoch: 1 step of 3 prompts"),
        (3, 4, "1", "wrap", 1, 4, "1 step of 4, the last with 1 prompt of"),
        (100, 1, "0.29", "short", 29, 29, "100 prompts, 0.29 epoch: 29 steps of 1"),
        (100, 1, "0.57", "drop", 57, 57, "57 steps of 1"),
        (100, 10, "1.1", "short", 11, 110, "100 prompts, 1.1 epochs: 11 steps of 10"),
        (10, 4, "0.25", "short", 1, 3, "1 step of 3 prompts"),
        (10, 4, "1e-9", "short", 1, 1, "1 step of 1 prompt"),
        (10, 4, "3", "short", 8, 30, "10 prompts, 3 epochs: 8 steps, the last of 2 prompts"),
        (8, 4, "2", "drop", 4, 16, "8 prompts, 2 epochs: 4 steps of 4"),
        (7473, 32, "1", "short", 234, 7473, "7,473 prompts, 1 epoch: 234 steps, the last of 17 prompts"),
    ],
)
def test_the_length_of_a_run_and_what_check_says_of_it(
    rows: int, size: int, number: str, last: str, steps: int, trained: int, text: str
) -> None:
    cfg = epochs(size=size, number=number, last=last)
    length = run_length(cfg, rows)
    assert (length.num_steps, length.num_rows) == (steps, trained)
    assert text in describe(cfg, rows)
    assert run_length(supervised(size, float(number), last), rows) == length


def test_where_steps_are_given_epochs_say_nothing() -> None:
    for last in ("short", "wrap", "drop"):
        cfg = epochs("num_steps=7", last=last)
        length = run_length(cfg, 3)
        assert (length.num_steps, length.num_rows, length.end) == (7, 28, None)
    assert describe(cfg, 10) == "10 prompts: 7 steps of 4, 2.8 epochs"


def test_no_whole_batch_is_refused_with_the_numbers_and_the_mend() -> None:
    with pytest.raises(
        ConfigError, match=r"the 3 prompts of 1 epoch are fewer than the 4 of a batch.*lower prompts_per"
    ):
        run_length(epochs(last="drop"), 3)
    with pytest.raises(ConfigError, match=r"the 2 examples of 0\.5 epoch .*lower examples_per_step.*last_batch short"):
        run_length(supervised(4, 0.5, "drop"), 4)
    for number in (".inf", ".nan", "0", "-1"):
        with pytest.raises(ConfigError, match="num_epochs"):
            epochs(number=number)


@given(
    rows=st.integers(1, 10_000),
    size=st.integers(1, 300),
    number=st.decimals("0.01", 20, places=2),
)
@settings(max_examples=200, deadline=None)
def test_the_numbers_are_exact(rows: int, size: int, number: Any) -> None:
    total = math.ceil(Fraction(number) * rows)
    short = run_length(supervised(size, float(number), "short"), rows)
    assert (short.num_rows, short.num_steps) == (total, math.ceil(Fraction(total, size)))
    wrap = run_length(supervised(size, float(number), "wrap"), rows)
    assert wrap.num_rows == short.num_steps * size == wrap.num_steps * size


def sizes(session: Session) -> list[int]:
    return [len({s.prompt_id for s in batch.samples}) for batch in session.world.batches]


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(("rows", "number", "batches"), [(10, "1", [4, 4, 2]), (3, "1", [3]), (3, "3", [4, 4, 1])])
def test_every_prompt_is_trained_once_an_epoch_and_the_last_step_takes_what_is_left(
    tmp_path: Path, staleness: int, rows: int, number: str, batches: list[int]
) -> None:
    cfg = epochs(f"algorithm.max_staleness={staleness}", number=number)
    session = Session(tmp_path, cfg, rows=rows)
    assert session.go() == "finished"
    assert sizes(session) == batches
    assert {row[2] for row in session.ledger_rows} == {"trained"}
    per_row = Counter(row[0].rsplit("/")[-1] for row in session.ledger_rows)
    assert per_row == {str(r): int(number) for r in range(rows)}
    assert [e.total_steps for e in session.events if isinstance(e, StepEvent)] == [len(batches)] * len(batches)


def test_wrap_fills_the_last_batch_from_the_epoch_after_and_drop_leaves_it_out(tmp_path: Path) -> None:
    wrap = Session(tmp_path / "wrap", epochs(last="wrap"))
    wrap.go()
    assert sizes(wrap) == [4, 4, 4]
    assert Counter(row[0].split("/")[1] for row in wrap.ledger_rows) == {"0": 10, "1": 2}
    drop = Session(tmp_path / "drop", epochs("algorithm.max_staleness=2", last="drop"))
    drop.go()
    assert sizes(drop) == [4, 4]
    assert [row[2] for row in drop.ledger_rows] == ["trained"] * 8, "what no step trains is not sampled"


def test_replacements_come_from_what_is_left_and_then_the_batch_is_smaller(tmp_path: Path) -> None:
    session = Session(tmp_path, epochs())
    session.world.broken = dict.fromkeys(("ten/0/1", "ten/0/4", "ten/0/7"), ScoreStatus.CRASHED)
    assert session.go() == "finished"
    assert sizes(session) == [4, 3]
    assert Counter(row[2] for row in session.ledger_rows) == {"trained": 7, "dropped": 3}
    assert all(row[0].startswith("ten/0/") for row in session.ledger_rows)
    assert session.loop.step == session.loop.total_steps
    assert session.run_dir.steps() == [0, 2]


def test_a_run_whose_prompts_are_used_up_early_is_finished_measured_saved_and_says_so(tmp_path: Path) -> None:
    session = Session(tmp_path, epochs(), eval_prompts=[Rows().item(0, 9)])
    cursor = Cursor(Rows(), seed=1)
    order = [cursor.next().id for _ in range(10)]
    session.world.broken = dict.fromkeys(order[8:], ScoreStatus.TIMEOUT)
    assert session.go() == "finished"
    assert sizes(session) == [4, 4]
    told = [e.text for e in session.events if isinstance(e, MessageEvent)]
    assert "the prompts of 1 epoch are used up after step 2 of 3; groups were dropped: 2 reward_timeout" in told
    assert session.run_dir.steps() == [0, 2]
    assert [e.step for e in session.events if type(e).__name__ == "EvalEvent"] == [0, 2]


def test_a_run_all_of_whose_groups_are_dropped_has_not_finished(tmp_path: Path) -> None:
    session = Session(tmp_path, epochs("algorithm.dynamic_sampling=true"), rows=3)
    session.world.same = {f"ten/0/{r}" for r in range(3)}
    with pytest.raises(RewardError, match=r"used up after step 0 of 1; groups were dropped: 3 no_signal\. Nothing was"):
        session.go()


@pytest.mark.parametrize("last", ["short", "drop"])
@pytest.mark.parametrize("stop_at", [0, 1])
def test_a_run_that_is_stopped_near_its_end_resumes_as_if_it_had_not_been(
    tmp_path: Path, last: str, stop_at: int
) -> None:
    cfg = epochs("algorithm.max_staleness=2", last=last)
    broken = dict.fromkeys(("ten/0/2", "ten/0/5"), ScoreStatus.CRASHED)
    whole = Session(tmp_path / "whole", cfg)
    whole.world.broken = broken
    whole.go()
    cut = Session(tmp_path / "cut", cfg, jitter=1)
    cut.world.broken = broken
    cut.world.on_update = lambda step: cut.loop.stop("SIGTERM") if step == stop_at else None
    cut.go()
    again = Session(tmp_path / "cut", cfg, jitter=2)
    again.world.broken = broken
    assert again.go() == "finished"
    assert [r[:3] for r in again.ledger_rows if r[2] == "trained"] == [
        r[:3] for r in whole.ledger_rows if r[2] == "trained"
    ]
    assert Session(tmp_path / "cut", cfg).go() == "finished", "and a finished one has nothing left to do"


@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 4),
    number=st.sampled_from(["0.3", "1", "1.5", "2"]),
    staleness=st.integers(0, 2),
    last=st.sampled_from(["short", "short", "drop", "wrap"]),
    dynamic=st.booleans(),
    bad=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 8)), max_size=8),
    same=st.sets(st.tuples(st.integers(0, 1), st.integers(0, 8)), max_size=4),
)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_dropped_every_prompt_is_trained_or_dropped_once_and_the_run_ends(
    rows: int, size: int, number: str, staleness: int, last: str, dynamic: bool, bad: set[Any], same: set[Any]
) -> None:
    cfg = epochs(
        f"algorithm.max_staleness={staleness}",
        f"algorithm.dynamic_sampling={dynamic}",
        size=size,
        number=number,
        last=last,
    )
    cursor = Cursor(Rows(rows), seed=cfg.seed)
    in_epochs = math.ceil(Fraction(number) * rows)
    expected = {cursor.next().id for _ in range(in_epochs)}
    with tempfile.TemporaryDirectory() as folder:
        try:
            session = Session(Path(folder), cfg, rows=rows)
        except ConfigError:
            assert last == "drop"
            assert in_epochs < size
            return
        session.world.distinct = True
        session.world.broken = {f"ten/{e}/{r}": ScoreStatus.CRASHED for e, r in bad}
        session.world.same = {f"ten/{e}/{r}" for e, r in same}
        with suppress(RewardError):
            assert session.go() == "finished"
    batches, planned = sizes(session), -(-in_epochs // size)
    assert session.loop.total_steps == len(batches) or batches == [], "it ended by itself, or had nothing to train on"
    states = {row[0]: row[2] for row in session.ledger_rows}
    if last == "wrap":
        assert batches == [size] * planned
        return
    assert set(states.values()) <= {"trained", "dropped"}
    assert set(states) <= expected
    assert len(batches) <= planned
    if last == "drop":
        assert batches == [size] * len(batches)
        assert "dropped" in states.values() or len(batches) == in_epochs // size
    else:
        assert set(states) == expected
        assert batches[:-1] == [size] * (len(batches) - 1)


@pytest.mark.parametrize(
    ("size", "number", "last", "batches"),
    [(3, 1, "short", [3, 1]), (3, 1, "wrap", [3, 3]), (3, 1, "drop", [3]), (3, 2.5, "short", [3, 3, 3, 1])],
)
def test_fine_tuning_ends_its_epochs_likewise(
    tmp_path: Path, size: int, number: float, last: str, batches: list[int]
) -> None:
    seen: list[list[str]] = []

    def batch_of(step: int, examples: Any) -> Any:
        seen.append([e.id for e in examples])
        return sft_batch(step, examples)

    cfg = supervised(size, number, last)
    loop = SftLoop(cfg, Learner(), Cursor(Examples(), seed=1), RunDir(tmp_path), [], lambda event: None, batch_of)
    assert asyncio.run(asyncio.wait_for(loop.run(), 20)) == "finished"
    assert [len(ids) for ids in seen] == batches
    if last == "short":
        ids = [i for batch in seen for i in batch]
        assert len(ids) == len(set(ids)) == math.ceil(Fraction(repr(number)) * 4)


@pytest.mark.parametrize(
    ("number", "last", "passes", "epochs_at_steps"),
    [
        ("1", "short", 1, [0, 0.4, 0.8]),
        ("1", "wrap", 2, [0, 0.4, 0.8]),
        ("1", "drop", 1, [0, 0.4]),
        ("2", "short", 2, [0, 0.4, 0.8, 1.2, 1.6]),
        ("1.25", "short", 2, [0, 0.4, 0.8, 1.2]),
    ],
)
def test_rewards_are_told_the_epochs_of_a_run_whose_last_batch_is_incomplete(
    tmp_path: Path, number: str, last: str, passes: int, epochs_at_steps: list[float]
) -> None:
    """Ten prompts, four a step."""
    session = Session(tmp_path, epochs(number=number, last=last))
    told: dict[int, TrainerState] = {}
    score = session.world.score

    async def note(requests: Sequence[ScoreRequest]) -> list[Score]:
        told.update({r.trainer.global_step: r.trainer for r in requests if r.trainer is not None})
        return await score(requests)

    session.world.score = note
    session.go()
    assert [told[step].epoch for step in sorted(told)] == pytest.approx(epochs_at_steps)
    assert {state.num_train_epochs for state in told.values()} == {passes}
    assert {state.max_steps for state in told.values()} == {len(epochs_at_steps)}


def test_at_its_end_a_run_has_passed_through_the_data_as_often_as_it_was_asked_to() -> None:
    end = TrainerState.at(3, 3, prompts_per_step=4, num_prompts=10, num_trained=10)
    assert (end.epoch, end.num_train_epochs) == (1.0, 1)
