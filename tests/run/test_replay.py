"""A recorded batch comes back as the learner got it; which steps can be replayed; when two figures are the same."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from grpo_ray.errors import CheckpointError
from grpo_ray.run.replay import check_replayable, compare, how_to_replay, read_batch, replayable_steps
from grpo_ray.run.rollout_log import distinct_refs, read_rollouts, write_rollouts
from grpo_ray.run.run_dir import RunDir
from grpo_ray.types import (
    Group,
    Prompt,
    Sample,
    SampleInfo,
    Score,
    ScoreStatus,
    Step,
    TrainBatch,
    TrainSample,
    Truncation,
    VersionSpan,
)
from tests.batches import batch_of


def odd_groups() -> list[Group]:
    """Three groups whose samples lie in two lists, with everything that floats can be, and an empty completion."""
    rng = np.random.default_rng(3)
    logprobs = np.array([-0.1, -np.inf, np.nan, -1e-45, -0.0, np.float32(-1) / 3], np.float32)
    lists: tuple[list[Sample], list[Sample]] = ([], [])
    groups = []
    for number in range(3):
        prompt = Prompt(f"set/0/{number}", list(range(5 + number)), "?", None, {})
        g = Group(prompt, number, 7)
        for index in range(2):
            size = (number * 2 + index) % 6
            ref = lists[index]
            ref.append(
                Sample(
                    prompt.id,
                    index,
                    np.array(prompt.token_ids, np.int32),
                    rng.integers(0, 2**31 - 1, size, dtype=np.int32),
                    rng.permutation(logprobs)[:size],
                    (VersionSpan(6, 0, size),),
                    "stop",
                    f"text {index}",
                )
            )
            g.samples.append(SampleInfo(prompt.id, index, 5 + number, size, 6, "stop", "rollout-0", ref, len(ref) - 1))
            value = math.nan if (number, index) == (1, 0) else 1.0
            g.scores.append(Score(ScoreStatus.OK if value == value else ScoreStatus.ERROR, value))
            g.advantages.append(0.1 / 3 * (index - 0.5) + number)
            g.steps.append(tuple(Step(end, 0.1 / (3 + end)) for end in range(size) if end % 2))
        groups.append(g)
    return groups


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    return one == other or (one != one and other != other)


def assert_same_batch(got: TrainBatch, want: TrainBatch) -> None:
    assert (got.step, got.temperature, got.truncation) == (want.step, want.temperature, want.truncation)
    assert len(got.samples) == len(want.samples)
    for mine, theirs in zip(got.samples, want.samples, strict=True):
        for f in fields(TrainSample):
            if f.name not in ("ref", "row"):
                assert same(getattr(mine, f.name), getattr(theirs, f.name)), f.name
        for f in fields(Sample):
            assert same(getattr(mine.ref[mine.row], f.name), getattr(theirs.ref[theirs.row], f.name)), f.name


def test_a_batch_comes_back_from_its_file_bit_for_bit(tmp_path: Path) -> None:
    groups = odd_groups()
    batch = replace(batch_of(groups, step=7, temperature=0.7), truncation=Truncation(0.9, 20, 0.1))
    exploded = replace(batch, samples=[replace(batch.samples[0], advantage=math.nan), *batch.samples[1:]])
    assert [s.loss_mask for s in batch.samples] == [True, True, False, True, True, True]
    assert [len(s.steps) for s in batch.samples] == [0, 0, 1, 1, 2, 2]
    for step, one in ((8, batch), (9, replace(exploded, step=9))):
        path = write_rollouts(tmp_path, step, groups, one, distinct_refs(groups), run_seed=1)
        assert_same_batch(read_batch(path), one)


def test_rewards_from_which_the_learner_computed_advantages_come_back_as_rewards(tmp_path: Path) -> None:
    groups = odd_groups()
    batch = batch_of(groups, step=7)
    batch = replace(batch, samples=[replace(s, advantage=None, steps=()) for s in batch.samples])
    path = write_rollouts(tmp_path, 8, groups, batch, distinct_refs(groups), run_seed=1)
    assert_same_batch(read_batch(path, advantages_on_learner=True), batch)
    assert [row["advantage"] for row in read_rollouts(path)] == [1.0, 1.0, None, 1.0, 1.0, 1.0], "what it was given"


def test_the_folders_of_a_file_are_made_with_it(tmp_path: Path) -> None:
    groups = odd_groups()
    path = write_rollouts(tmp_path / "run" / "rollouts", 7, groups, batch_of(groups, step=7), distinct_refs(groups), 1)
    assert path == tmp_path / "run" / "rollouts" / "step-000007.parquet"
    assert len(read_rollouts(path)) == 6


def test_a_file_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    groups = odd_groups()
    path = write_rollouts(tmp_path, 8, groups, batch_of(groups, 7), distinct_refs(groups), run_seed=1)
    pq.write_table(pq.read_table(path).drop_columns(["loss_mask"]), path)
    with pytest.raises(CheckpointError, match=r"step-000008.parquet has no column 'loss_mask'"):
        read_batch(path)
    write_rollouts(tmp_path, 8, groups, batch_of(groups, 7), distinct_refs(groups), run_seed=1)
    pq.write_table(pq.read_table(path).drop_columns(["advantage_steps"]), path)
    assert all(s.steps == () for s in read_batch(path).samples), "before process supervision there were none"
    write_rollouts(tmp_path, 8, groups, batch_of(groups, 7), distinct_refs(groups), run_seed=1)
    pq.write_table(pq.read_table(path).drop_columns(["top_p", "top_k", "min_p"]), path)
    assert not read_batch(path).truncation.any, "the learner knew none"
    path.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="can't be read"):
        read_batch(path)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Batches of steps 1 to 6, checkpoints of 2, 4 and 6."""
    run = RunDir(tmp_path)
    run.rollouts.mkdir()
    for step in range(1, 7):
        (run.rollouts / f"step-{step:06d}.parquet").touch()
    for step in (2, 4, 6):
        place = run.store.begin(step)
        with place.filling("loop") as (folder, sums):
            (folder / "loop.json").write_text("{}")
        run.store.commit(place, step, sums, keep=3)
    return run


def test_a_step_needs_its_batch_and_the_checkpoint_before_it(run: RunDir) -> None:
    assert replayable_steps(run) == [1, 3, 5]
    for step in (1, 3, 5):
        check_replayable(run, step)
    with pytest.raises(
        CheckpointError,
        match=r"step 4 .*no checkpoint of step 3\. Steps that can: 1, 3, 5; .*checkpoint\.every_steps=1",
    ):
        check_replayable(run, 4)
    with pytest.raises(CheckpointError, match=r"step 7 .*rollouts/ has no batch of step 7\. Steps that can: 1, 3, 5"):
        check_replayable(run, 7)


def test_a_failed_step_says_how_to_repeat_it(run: RunDir) -> None:
    assert how_to_replay(run, 5, recorded=True).endswith(f"`grpo-ray replay {run.path} --step 5` repeats the step")
    assert "with a checkpoint of step 3" in how_to_replay(run, 4, recorded=True)
    assert "tracking.rollouts" in how_to_replay(run, 5, recorded=False)


@pytest.mark.parametrize(
    ("recorded", "agree"),
    [
        ({"loss/policy": 1e-9, "grad_norm": 2.0}, [True, True]),
        ({"loss/policy": -3e-7, "grad_norm": 2.0 + 1e-6}, [True, True]),
        ({"loss/policy": 2e-6, "grad_norm": 2.0 + 1e-5}, [False, False]),
        ({"loss/policy": 1e-9, "grad_norm": None}, [True, False]),
        ({}, [False, False]),
    ],
)
def test_a_millionth_is_the_most_that_figures_may_differ(recorded: dict[str, float | None], agree: list[bool]) -> None:
    figures = compare(recorded, {"loss/policy": 1e-9, "grad_norm": 2.0, "entropy": 1.0}, tolerance=1e-6)
    assert [f.agrees for f in figures] == agree


def test_figures_are_told_with_every_digit() -> None:
    small = 0.1 + 0.2
    same_bits, other = compare(
        {"loss/policy": small, "grad_norm": 2.0}, {"loss/policy": small, "grad_norm": 3.0}, tolerance=0.1
    )
    assert str(same_bits) == f"loss/policy  recorded {small!r}  replayed {small!r}  the same bits"
    assert str(other) == "grad_norm    recorded 2  replayed 3  difference 1, too large"
