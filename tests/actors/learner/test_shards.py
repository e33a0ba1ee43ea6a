"""A model loaded shard by shard is, bit for bit, the one that every rank loads whole, and takes its memory once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actors.learner.shards import stored_dtype
from tests.bench.loading import make_model, measure

pytestmark = pytest.mark.long

SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("float32", "bfloat16"),
        pytest.param("float32", "float32", marks=pytest.mark.slow),
        pytest.param("bfloat16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_masters_and_buffers_are_those_of_a_model_that_every_rank_loads_whole(
    stored: str, dtype: str, tmp_path: Path
) -> None:
    """Three ranks, which do not divide all parameters evenly."""
    folder = make_model(tmp_path / "model", stored, **SMALL)
    shards, whole = (measure(folder, way, ranks=3, dtype=dtype).digest for way in ("shards", "whole"))
    assert shards == whole
    assert len(set(shards.split("-"))) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stored", "overrides"),
    [
        ("float32", ["model.dtype=float32", "learner.weight_decay=0.1", "algorithm.beta=0.1"]),
        ("float32", ["model.dtype=bfloat16"]),
        ("bfloat16", ["model.dtype=bfloat16", "algorithm.beta=0.1", "model.gradient_checkpointing=true"]),
        ("bfloat16", ["model.dtype=bfloat16", "model.lora={r: 4}"]),
    ],
)
def test_steps_of_a_model_loaded_shard_by_shard_are_those_of_one_loaded_whole(
    stored: str, overrides: list[str], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", stored, **SMALL)
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.actors.learner.loaded", str(folder), *overrides],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shards, whole = json.loads(done.stdout.splitlines()[-1])
    assert min(shards["norms"]) > 0
    assert len(shards) > 20
    assert shards == whole


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_take_the_model_and_its_largest_weight_while_they_load_it(tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "num_layers": 16, "num_heads": 8, "num_kv_heads": 8, "vocab_size": 65_536}
    folder = make_model(tmp_path / "model", "bfloat16", **shape)
    largest = 65_536 * 512 * 2
    found = {ranks: measure(folder, "shards", ranks=ranks, dtype="bfloat16") for ranks in (2, 4)}
    for ranks, m in found.items():
        assert m.loading.own <= 1.2 * m.model + largest, (ranks, m)


def test_a_checkpoint_is_read_in_its_own_dtype_if_it_has_one(tmp_path: Path) -> None:
    ones = torch.ones(2, 2)
    for name, dtypes, expected in (
        ("a", [torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ("b", [torch.bfloat16, torch.float32], torch.float32),
        ("c", [torch.float16], torch.float16),
        ("d", [torch.float64], torch.float32),
        ("e", [], torch.float32),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for i, dtype in enumerate(dtypes):
            save_file({f"w{i}": ones.to(dtype)}, folder / f"model-{i}.safetensors")
        assert stored_dtype(str(folder)) == expected, name
    (tmp_path / "a" / "model-0.safetensors").write_bytes(b"torn")
    assert stored_dtype(str(tmp_path / "a")) == torch.float32
    assert stored_dtype("no-such/model") == torch.float32
