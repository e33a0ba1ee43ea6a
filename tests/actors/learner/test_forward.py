"""The way that a learner's model goes, by real DeepSpeed ranks: against plain Transformers and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from actors.learner.group import LearnerGroup
from grpo_ray.errors import ConfigError
from tests.actors.learner.test_learner import (
    exported,
    make_batch,
    make_config,
    moved_apart,
    plain_step,
    run,
    start,
)
from tests.models.small import small_config, small_model

pytestmark = pytest.mark.usefixtures("local_ray")

SCALED = """
from transformers import Qwen2ForCausalLM

class ScaledForCausalLM(Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * (1.5 if out.logits.shape[1] > 4 else 1.0)
        return out
"""


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3.5 of two layers, a gated delta net and an attention."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    small_model(small_config("qwen3_5_text", vocab_size=200)).save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize(
    ("ranks", "stage", "model"),
    [
        pytest.param(1, 0, {}, id="stage 0"),
        pytest.param(2, 3, {"gradient_checkpointing": True}, id="stage 3", marks=pytest.mark.slow),
    ],
)
def test_a_hybrid_s_step_is_that_of_plain_pytorch(
    ranks: int, stage: int, model: dict[str, Any], hybrid: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    batch = make_batch()
    want, want_norm, want_mismatch = plain_step(hybrid, batch)
    group = start(make_config(hybrid, ranks=ranks, stage=stage, model=model), tmp_path)
    groups.append(group)
    metrics = run(group.update(batch)).metrics
    assert metrics["grad_norm"] == pytest.approx(want_norm, rel=1e-4)
    assert metrics["mismatch/mean_abs"] == pytest.approx(want_mismatch, rel=1e-5)
    assert metrics["tokens/trained"] == sum(s.num_tokens for s in batch.samples if s.loss_mask)
    assert metrics["tokens/shared"] == 0
    assert moved_apart(exported(group, tmp_path / "hf"), want, load_file(hybrid / "model.safetensors")) < 1e-4


def test_a_class_that_computes_something_else_than_the_learner_is_refused(
    tiny_model: Path, tmp_path: Path, groups: list[LearnerGroup]
) -> None:
    import json

    folder = tmp_path / "scaled"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "modeling_scaled.py").write_text(SCALED)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_scaled.ScaledForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    expected = r"ScaledForCausalLM can't be trained.*packed \(log-probabilities are off by .* nats.*plain \(log-prob"
    with pytest.raises(ConfigError, match=expected):
        groups.append(start(make_config(folder, ranks=1, stage=2, model={"trust_remote_code": True}), tmp_path))
