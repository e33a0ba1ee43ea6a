"""The estimate of a learner's memory against a learner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.learner.group import ONEDNN_ENV
from actors.runtime import ALLOCATOR_ENV
from grpo_ray.config.model import TinyModelConfig
from grpo_ray.models.files.tiny import build_tiny_model
from grpo_ray.models.memory.estimate import GIB, known_facts, learner_memory
from tests.recipes import run_config

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]
TOKENS, SAMPLE = 1024, 128


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.gradient_checkpointing=true",),
        ("algorithm.beta=0.1",),
        ("model.lora={}",),
        ("model.dtype=bfloat16",),
        ("learner.zero_stage=3",),
    ],
)
def test_a_learner_holds_what_was_estimated(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Two steps of two micro-batches of 30 million parameters, half of them in the embeddings."""
    tiny = TinyModelConfig(hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, vocab_size=32_768)
    folder = build_tiny_model(tmp_path / "model", tiny)
    config = run_config(
        f"model={{path: {folder}, tiny: null, dtype: float32}}",
        f"data.max_prompt_length={SAMPLE // 2}",
        f"rollout={{max_completion_length: {SAMPLE // 2}, num_generations: 8}}",
        f"prompts_per_step={2 * TOKENS // SAMPLE // 8}",
        f"learner.micro_batch_tokens={TOKENS}",
        "learner.overlap=false",
        *overrides,
    )
    facts = known_facts(config.model)
    assert facts is not None
    found = measured(config.model_dump_json(), str(folder))
    memory = learner_memory(facts, config, on_gpu=False)
    told = f"{found / GIB:.2f} GiB measured, {memory}"
    assert (memory.total - memory.base) == pytest.approx(found, rel=0.2), told


def measured(config: str, folder: str) -> int:
    """Bytes that a learner has taken after two steps, beyond its libraries."""
    env = {**os.environ, **ALLOCATOR_ENV, **ONEDNN_ENV, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.actors.learner.measured", config, folder, str(TOKENS), str(SAMPLE)],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(json.loads(done.stdout.splitlines()[-1])["bytes"])
