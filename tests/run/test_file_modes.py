"""Who may read what a run writes: whom the umask lets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.run.checkpoint_store import Store


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    return {p.stat().st_mode & 0o777 for p in folder.rglob("*") if p.is_file()}


def test_a_checkpoint_and_its_exported_model_follow_the_umask(tmp_path: Path, umask: int) -> None:
    store = Store(str(tmp_path))
    place = store.begin(1)
    with place.filling("hf") as (folder, sums):
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    final = store.commit(place, 1, sums, keep=1)
    assert modes(Path(final.url)) == {0o666 & ~umask}


def test_the_log_of_an_actor_follows_it(tmp_path: Path, umask: int) -> None:
    code = f"from actors.runtime import own_log; own_log({str(tmp_path)!r}, 'rollout-0')"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=100)
    assert modes(tmp_path) == {0o666 & ~umask}


def test_a_model_that_is_made_on_the_spot_follows_it_too(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        tiny = TinyModelConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1)
        assert modes(build_tiny_model(tmp_path / "model", tiny)) == {0o644}
    finally:
        os.umask(before)
