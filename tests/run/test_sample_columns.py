"""The columns of a sample in Parquet: one definition for three files, and files of earlier versions are read as they were."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_ray.errors import DataError
from grpo_ray.run import kept_groups, rollout_log, sample_files
from grpo_ray.run.kept_groups import read_groups
from grpo_ray.run.replay import read_batch
from grpo_ray.run.rollout_log import read_rollouts
from grpo_ray.run.sample_columns import (
    ARRAYS,
    COLUMNS,
    rows_and_samples,
    sample_cells,
    schema,
    score_cells,
    table_of,
)
from grpo_ray.run.sample_files import read_samples
from grpo_ray.types import LoggedMetric, RewardScore, Sample, Score, ScoreStatus, Step, Truncation, VersionSpan

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
"""A step's rollouts, the groups of a checkpoint and a folder of samples, written before their columns had one definition: two
completions of one prompt, of which the second has no score."""
FILES = {
    "step-000005.parquet": rollout_log.SCHEMA,
    "groups.parquet": kept_groups._SCHEMA,
    "samples/samples-000000.parquet": sample_files.SCHEMA,
}


ADDED = {
    "step-000005.parquet": ("num_sampled", "turns"),
    "groups.parquet": ("turns",),
    "samples/samples-000000.parquet": ("versions", "num_sampled", "turns"),
}
"""Columns that files of that version do not have."""


@pytest.mark.parametrize("file", FILES)
def test_the_layout_on_disk_is_that_of_earlier_versions_but_for_columns_that_are_named(file: str) -> None:
    kept = pa.schema([field for field in FILES[file] if field.name not in ADDED[file]])
    assert kept.equals(pq.read_schema(WRITTEN / file).remove_metadata())
    assert set(FILES[file].names) == {*kept.names, *ADDED[file]}


def test_a_column_has_one_type_in_all_files() -> None:
    names = [name for layout in FILES.values() for name in layout.names]
    assert set(names) == set(COLUMNS)
    for layout in FILES.values():
        for field in layout:
            if field.name != "rewards" or layout is rollout_log.SCHEMA:
                assert field.type == COLUMNS[field.name], field.name
    fewer = {
        field.name: field.type for field in FILES["samples/samples-000000.parquet"].field("rewards").type.value_type
    }
    of_all = COLUMNS["rewards"].value_type
    assert fewer == {name: of_all.field(name).type for name in ("name", "status", "value", "detail", "extra")}


def test_a_step_of_an_earlier_version_is_read_for_replay() -> None:
    batch = read_batch(WRITTEN / "step-000005.parquet")
    assert (batch.step, batch.version) == (5, 4)
    assert (batch.temperature, batch.truncation) == (0.7, Truncation(0.9, 20, 0.1))
    first, second = batch.samples
    assert first.reward == 1.0
    assert math.isnan(second.reward)
    assert (first.advantage, first.steps, first.part) == (0.5, (Step(0, 0.75), Step(2, 0.25)), 1)
    assert (second.advantage, second.steps, second.loss_mask) == (0.0, (), False)
    sample = first.ref[first.row]
    assert (sample.prompt_id, sample.index, sample.finish_reason, sample.text) == (
        "set/0/7",
        0,
        "stop",
        "7 \N{SNOWMAN}",
    )
    assert sample.versions == (VersionSpan(3, 0, 1), VersionSpan(4, 1, 3))
    assert sample.prompt_token_ids.tolist() == [5, 6, 7]
    assert sample.token_ids.tolist() == [9, 2, 1]
    assert sample.logprobs.tobytes() == np.array([-0.1, -0.25, -3.0], np.float32).tobytes()


def test_rollouts_of_an_earlier_version_are_read_for_the_report() -> None:
    first, second = read_rollouts(WRITTEN / "step-000005.parquet")
    assert (first["step"], first["prompt"], first["completion"], first["worker"]) == (
        5,
        "3 + 4 =",
        "7 \N{SNOWMAN}",
        "rollout-0",
    )
    assert [row["reward"] for row in (first, second)] == [1.0, None]
    assert first["rewards"] == [
        {
            "name": "accuracy",
            "status": "ok",
            "value": 1.0,
            "detail": "",
            "seconds": 0.5,
            "steps": [{"end": 0, "value": 0.25}, {"end": 2, "value": 0.75}],
            "extra": '{"note": "seen"}',
        }
    ]


def test_groups_of_a_checkpoint_of_an_earlier_version_are_taken() -> None:
    (group,) = read_groups(WRITTEN / "groups.parquet")
    assert (group.order, group.dispatched_version, group.prompt_id) == (12, 4, "set/0/7")
    assert (group.min_versions, group.workers) == ([3, 3], ["rollout-0", "rollout-1"])
    assert [s.token_ids.tolist() for s in group.samples] == [[9, 2, 1], [9, 2]]
    scored, failed = group.scores
    assert (scored.value, scored.steps) == (1.0, (Step(0, 0.25), Step(2, 0.75)))
    assert (scored.parts[0].extra, scored.parts[0].logged) == ((("note", "seen"),), (LoggedMetric("len", 3.0, 1, 0),))
    assert failed.status is ScoreStatus.TIMEOUT
    assert math.isnan(failed.value)


def test_samples_of_an_earlier_version_are_read() -> None:
    first, second = read_samples(WRITTEN / "samples")
    assert first["messages"] == [{"role": "user", "content": "3 + 4 ="}]
    assert first["columns"] == {"answer": "7"}
    assert (first["completion_ids"], first["reward"], first["model_sha256"]) == ([9, 2, 1], 1.0, "0" * 64)
    assert second["rewards"] == [
        {"name": "accuracy", "status": "timeout", "value": None, "detail": "too slow", "extra": None}
    ]
    metadata = pq.read_schema(WRITTEN / "samples/samples-000000.parquet").metadata
    assert metadata[b"left_out"] == b'[{"prompt_id": "set/0/8", "why": "crashes"}]'


def test_a_cell_that_a_file_has_no_column_for_is_left_out() -> None:
    fewer = pa.schema([("index", COLUMNS["index"])])
    assert table_of([{"index": 3, "prompt": "?"}], fewer).to_pylist() == [{"index": 3}]


def test_a_file_may_have_fewer_fields_of_its_rewards() -> None:
    few = schema(("step", "rewards"), ("name", "value"))
    want = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
    assert few.equals(pa.schema([("step", pa.int64()), ("rewards", want)]))
    assert schema(("rewards",)).field("rewards").type == COLUMNS["rewards"]


def test_cells_are_as_wide_as_their_columns_and_what_is_logged_is_text_as_it_was() -> None:
    sample = Sample("p", 0, [1, 2], [3], [-0.5], (VersionSpan(1, 0, 1),), "stop", "x")  # type: ignore[arg-type]
    cells = sample_cells(sample)
    assert [cells[name].dtype for name in ARRAYS] == [np.int32, np.int32, np.float32]
    part = RewardScore("f", ScoreStatus.OK, 1.0, extra=(("why", "\u00e9"),))
    assert score_cells(Score(ScoreStatus.OK, 1.0, (part,)))["rewards"][0]["extra"] == '{"why": "\u00e9"}'


def test_rollouts_are_read_by_columns_and_what_holds_none_is_named(tmp_path: Path) -> None:
    path = WRITTEN / "step-000005.parquet"
    rows = read_rollouts(path, ("step", "index"))
    assert rows == [{"step": 5, "index": row["index"]} for row in read_rollouts(path)]
    with pytest.raises(DataError, match=r"step-000005\.parquet holds no rollouts: it has no column 'colour'$"):
        read_rollouts(path, ("step", "colour"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"x\.parquet can't be read: \w"):
        read_rollouts(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"gone\.parquet can't be read: .*gone\.parquet"):
        read_rollouts(tmp_path / "gone.parquet")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_experts_of_a_sample_are_read_as_they_were_written(tmp_path: Path, dtype: type[np.integer]) -> None:
    routes = np.arange(3 * 2 * 2, dtype=dtype).reshape(3, 2, 2) * 20
    made = Sample("p", 0, *_arrays([1, 2], [3, 4]), (VersionSpan(1, 0, 2),), "stop", "x", routes)
    pq.write_table(
        table_of([sample_cells(s) for s in (made, replace(made, routes=None))], CELLS), tmp_path / "x.parquet"
    )
    (_, read), (_, without) = rows_and_samples(pq.read_table(tmp_path / "x.parquet"))
    assert read.routes is not None
    assert (read.routes.dtype, read.routes.tolist()) == (np.dtype(dtype), routes.tolist())
    assert without.routes is None


CELLS = schema(
    (
        "prompt_id",
        "index",
        "prompt_ids",
        "completion_ids",
        "rollout_logprobs",
        "versions",
        "finish_reason",
        "completion",
    )
)


def _arrays(prompt: list[int], completion: list[int]) -> tuple[Any, Any, Any]:
    return np.array(prompt, np.int32), np.array(completion, np.int32), np.zeros(len(completion), np.float32)
