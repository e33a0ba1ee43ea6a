"""What is sampled after a swap is what a fresh engine with those weights samples, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.rollout.vllm_options import rollout_env
from grpo_ray.config.rollout import RolloutConfig
from tests.actors.weights.shadowed import ORDER, PAUSED

pytestmark = pytest.mark.long

LIMIT_S = 600


def other_weights(folder: Path, model: Path, seed: int, *, tied: bool) -> Path:
    """A model like this one in which every parameter is another, biases and norms too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(model, folder)
    config = AutoConfig.from_pretrained(model, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    net: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    net.save_pretrained(folder)
    return folder


def shadowed(models: list[Path], dtype: str, mode: str) -> list[dict[str, Any]]:
    env = os.environ | rollout_env(RolloutConfig(max_completion_length=64), on_gpu=False, backend="gloo")
    command = [sys.executable, "-m", "tests.actors.weights.shadowed", dtype, mode, *map(str, models)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.timeout(LIMIT_S + 30)
@pytest.mark.parametrize(
    ("dtype", "mode", "tied"),
    [
        ("float32", "eager", (True, False)),
        pytest.param("bfloat16", "eager", (True, False), marks=pytest.mark.slow),
        pytest.param("float32", "compiled", (False,), marks=pytest.mark.slow),
    ],
)
def test_an_engine_samples_bit_for_bit_with_what_was_loaded_beside_it(
    tiny_model: Path, tmp_path: Path, dtype: str, mode: str, tied: tuple[bool, ...]
) -> None:
    models = [
        other_weights(tmp_path / f"{seed}-{ties}", tiny_model, seed, tied=ties) for ties in tied for seed in range(3)
    ]
    kinds = shadowed(models, dtype, mode)
    assert len(kinds) == len(tied)
    for seen in kinds:
        assert seen["draws_beside"] >= len(ORDER)
        assert len({json.dumps(samples) for samples in seen["fresh"]}) == 3
        assert seen["refused"], "and harmed nothing"
        for number, samples in zip((*ORDER, *PAUSED), seen["swapped"], strict=True):
            assert samples == seen["fresh"][number]
        assert seen["shared_buffers"] == ["cos_sin_cache"], "tables are not held twice, and nothing else is shared"
    assert len({json.dumps(seen["fresh"]) for seen in kinds}) == len(tied)
