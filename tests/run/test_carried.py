"""A resumed run takes what was finished from its checkpoint, and samples only what is missing."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_ray.errors import CheckpointError
from grpo_ray.run.kept_groups import KeptGroup, read_groups, write_groups
from grpo_ray.run.ledger import LedgerRow
from grpo_ray.run.restored_groups import RestoredGroups
from grpo_ray.telemetry.events import MessageEvent
from grpo_ray.types import (
    Group,
    Prompt,
    RewardScore,
    Sample,
    SampleInfo,
    Score,
    ScoreStatus,
    Step,
    SyncReport,
    TrainBatch,
    VersionSpan,
)
from tests.loop.test_train_loop import Session, config, essence

AHEAD = ("num_steps=10", "algorithm.max_staleness=2")


def group_of(order: int, versions: list[tuple[int, ...]], scores: list[Score]) -> tuple[Group, list[Sample]]:
    rng = np.random.default_rng(order)
    samples = []
    for index, of_sample in enumerate(versions):
        length = len(of_sample)
        samples.append(
            Sample(
                f"data/0/{order}",
                index,
                np.asarray([1, 2, order], dtype=np.int32),
                rng.integers(0, 1 << 31, length).astype(np.int32),
                rng.standard_normal(length).astype(np.float32),
                tuple(VersionSpan(v, i, i + 1) for i, v in enumerate(of_sample)),
                "length" if index else "stop",
                "text \N{SNOWMAN} \n",
            )
        )
    infos = [
        SampleInfo(s.prompt_id, s.index, 3, len(s.token_ids), min(v, default=4), s.finish_reason, "w-1", samples, i)
        for i, (s, v) in enumerate(zip(samples, versions, strict=True))
    ]
    prompt = Prompt(f"data/0/{order}", [1, 2, order], "", None, {})
    return Group(prompt, order, 4, infos, scores), samples


finite = st.floats(allow_nan=False, allow_infinity=False)
steps = st.lists(st.builds(Step, st.integers(0, 9), finite), max_size=2).map(tuple)
parts = st.builds(
    RewardScore, st.text(max_size=3), st.sampled_from(list(ScoreStatus)), finite | st.just(math.inf), steps=steps
)
scores = st.builds(
    Score, st.sampled_from(list(ScoreStatus)), finite, st.lists(parts, max_size=2).map(tuple), st.text(), steps
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4).map(tuple), scores), min_size=1, max_size=3))
def test_groups_come_back_bit_by_bit(tmp_path_factory: pytest.TempPathFactory, members: list[Any]) -> None:
    path = tmp_path_factory.mktemp("kept") / "groups.parquet"
    made = [group_of(order, [v for v, _ in members], [s for _, s in members]) for order in (12, 7)]
    write_groups(path, [g for g, _ in made], [samples for _, samples in made])
    back = read_groups(path)
    assert [k.order for k in back] == [7, 12]
    for kept, (group, samples) in zip(back, reversed(made), strict=True):
        assert (kept.prompt_id, kept.dispatched_version, kept.scores) == (group.prompt.id, 4, group.scores)
        assert kept.infos(ref := object()) == [
            replace(info, ref=ref, row=row) for row, info in enumerate(group.samples)
        ]
        for got, want in zip(kept.samples, samples, strict=True):
            assert got.token_ids.tobytes() == want.token_ids.tobytes()
            assert got.logprobs.tobytes() == want.logprobs.tobytes()
            assert got.prompt_token_ids.tobytes() == want.prompt_token_ids.tobytes()
            assert (got.versions, got.finish_reason, got.text) == (want.versions, want.finish_reason, want.text)


def test_no_groups_are_an_empty_file_and_a_score_that_is_no_number_stays_none(tmp_path: Path) -> None:
    write_groups(tmp_path / "none", [], [])
    assert read_groups(tmp_path / "none") == []
    group, samples = group_of(1, [(3,)], [Score(ScoreStatus.TIMEOUT, math.nan, detail="late")])
    write_groups(tmp_path / "nan", [group], [samples])
    (kept,) = read_groups(tmp_path / "nan")
    assert math.isnan(kept.scores[0].value)
    assert kept.scores[0].status is ScoreStatus.TIMEOUT


def cut_run(folder: Path, stop_at: int = 4, jitter: int = 1) -> Session:
    session = Session(folder, config(*AHEAD), jitter)
    session.world.on_update = lambda step: session.loop.stop("SIGTERM") if step == stop_at else None
    sync = session.world.sync

    async def slow(version: int) -> SyncReport:
        """So that something is finished meanwhile, however slow the machine is."""
        groups = session.loop.collector
        while groups._under_way and not groups._ready and not any(filling.done() for filling in groups._under_way):
            await asyncio.sleep(0.001)
        return await sync(version)

    session.world.sync = slow
    assert session.go() == "SIGTERM"
    return session


def kept_in(session: Session, step: int) -> list[KeptGroup]:
    with session.run_dir.store.place(step).reading() as files:
        return read_groups(files.local("loop/groups.parquet"))


def versions_of(batch: TrainBatch) -> list[int]:
    return [span.version for s in batch.samples for span in s.ref[s.row].versions]


@pytest.mark.parametrize("jitter", range(4))
def test_only_what_was_not_finished_is_sampled_again_and_the_ledger_has_each_prompt_once(
    tmp_path: Path, jitter: int
) -> None:
    whole = Session(tmp_path / "whole", config(*AHEAD), jitter)
    whole.go()
    first = cut_run(tmp_path / "cut", jitter=jitter)
    kept = kept_in(first, 5)
    assert kept, "with two steps ahead something is always finished"
    second = Session(tmp_path / "cut", config(*AHEAD), jitter + 10)
    assert second.go() == "finished"
    again = {k.prompt_id for k in kept} & set(second.world.begun)
    assert again == set()
    assert second.world.num_drawn == 4 * (3 * 10 - 3 * 5 - len(kept))
    (told,) = [e.text for e in second.events if isinstance(e, MessageEvent) and "finished groups" in e.text]
    assert told.startswith(f"{len(kept)} finished groups are taken from the checkpoint; ")
    assert [r[:4] for r in second.ledger_rows] == [r[:4] for r in whole.ledger_rows]
    halves = [essence(b) for b in first.world.batches + second.world.batches]
    assert halves == [essence(b) for b in whole.world.batches]
    ages = [b.version - version for b in second.world.batches for version in versions_of(b)]
    assert max(ages) <= 2


def test_what_was_dropped_is_not_sampled_again_either(tmp_path: Path) -> None:
    overrides = ("algorithm.dynamic_sampling=true", "algorithm.max_sampling_rounds=9")
    for jitter in range(6):
        first = Session(tmp_path / str(jitter), config(*AHEAD, *overrides), jitter)
        same = {f"ten/{e}/{r}" for e in range(9) for r in (1, 4, 7)}
        first.world.same = same
        first.world.on_update = lambda step, loop=first.loop: loop.stop("SIGTERM") if step == 4 else None
        assert first.go() == "SIGTERM"
        rows = {row[0]: row for row in first.ledger_rows}
        second = Session(tmp_path / str(jitter), config(*AHEAD, *overrides), jitter + 10)
        second.world.same = same
        assert second.go() == "finished"
        dropped = {name for name, row in rows.items() if row[2] == "dropped"}
        assert dropped
        assert dropped & set(second.world.begun) == set()
        after = {row[0]: row for row in second.ledger_rows}
        assert all(after[name] == rows[name] for name in dropped)
        trained = [row[0] for row in second.ledger_rows if row[2] == "trained"]
        assert len(trained) == len(set(trained)) == 30


def test_a_run_that_dies_twice_keeps_what_the_second_checkpoint_has(tmp_path: Path) -> None:
    whole = Session(tmp_path / "whole", config(*AHEAD), 1)
    whole.go()
    for stop_at, jitter in ((2, 5), (3, 6), (7, 7)):
        cut_run(tmp_path / "cut", stop_at=stop_at, jitter=jitter)
    last = Session(tmp_path / "cut", config(*AHEAD), 8)
    assert last.go() == "finished"
    assert [r[:4] for r in last.ledger_rows] == [r[:4] for r in whole.ledger_rows]


@pytest.mark.parametrize(
    "changed", ["rollout.temperature=0.7", "rollout.num_generations=2", "reward.functions=[{name: r, weight: 2}]"]
)
def test_groups_that_were_sampled_or_scored_otherwise_are_sampled_again(tmp_path: Path, changed: str) -> None:
    first = cut_run(tmp_path)
    assert kept_in(first, 5)
    second = Session(tmp_path, config(*AHEAD, changed), 3)
    assert second.go() == "finished"
    assert second.world.num_drawn == (2 if "generations" in changed else 4) * 15


def test_groups_that_a_lower_bound_makes_too_old_are_sampled_again(tmp_path: Path) -> None:
    first = cut_run(tmp_path)
    kept = kept_in(first, 5)
    second = Session(tmp_path, config(*AHEAD, "algorithm.max_staleness=0"), 3)
    assert second.go() == "finished"
    fresh_enough = [k for k in kept if min(v for v in k.min_versions if v is not None) >= 5]
    assert len(fresh_enough) < len(kept)
    ages = [b.version - version for b in second.world.batches for version in versions_of(b)]
    assert set(ages) == {0}
    trained = [row[0] for row in second.ledger_rows if row[2] == "trained"]
    assert len(trained) == len(set(trained)) == 30
    assert any("too old now" in e.text for e in second.events if isinstance(e, MessageEvent))


def test_a_place_behind_dropped_ones_is_trained_sooner() -> None:
    """Bound 1, 3 prompts a step, checkpoint of step 5: version 4 may be trained at step 5 alone, as one of the first three."""
    cfg = config("algorithm.max_staleness=1")
    kept = [KeptGroup(order, 4, f"p/0/{order}", [], [4], [], []) for order in (20, 22, 23)]
    carried, too_old = RestoredGroups.of(kept, [], 20, 5, cfg)
    assert (sorted(carried.groups), too_old) == ([20, 22], 1)


def test_only_dropped_ones_before_a_place_and_behind_the_first_bring_it_forward() -> None:
    """As above, and of four that are dropped 18 comes before all, and 26 behind: only 20 and 22 leave their places to others."""
    cfg = config("algorithm.max_staleness=1")
    kept = [KeptGroup(order, 4, f"p/0/{order}", [], [4], [], []) for order in (21, 23, 25)]
    rows = [
        LedgerRow(f"p/0/{order}", order, "dropped", 4, None, 5, None, None, None, None, "no_signal", 0.0, None)
        for order in (18, 20, 22, 26)
    ]
    carried, too_old = RestoredGroups.of(kept, rows, 20, 5, cfg)
    # Their places are 0, 1 and 3: with 20 and 22 gone, 24 is the third of its step, and 25 waits for the next.
    assert (sorted(carried.groups), too_old) == ([21, 23], 1)
    assert carried.dropped == {18, 20, 22, 26}
    without, too_old = RestoredGroups.of(kept, [], 20, 5, cfg)
    assert (sorted(without.groups), too_old) == ([21], 2)


def test_the_loop_does_not_wait_for_the_disk_but_its_end_does(tmp_path: Path) -> None:
    session = Session(tmp_path, config("num_steps=4", "checkpoint.every_steps=1"))
    session.world.write_s = 0.1
    assert session.go() == "finished"
    assert session.run_dir.steps() == [3, 4]
    assert len(session.world.batches) == 4


def test_a_checkpoint_that_fails_ends_the_run_at_the_next(tmp_path: Path) -> None:
    session = Session(tmp_path, config("checkpoint.every_steps=2"))
    session.world.on_update = lambda step: setattr(session.world, "disk_is_full", step >= 1)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 .*No space left on device"):
        session.go()
    assert [b.step for b in session.world.batches] == [1, 2, 3, 4]
    assert session.run_dir.steps() == [0]
