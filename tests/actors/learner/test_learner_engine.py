"""What a learner's engine is made of, before DeepSpeed has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner.build import LearnerSpec, load_hf
from actors.learner.group import _spec
from grpo_ray.batch.sequence import Alone
from tests.actors.learner.test_learner import make_config

WITH_DROPOUT: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"attention_dropout": 0.5, "num_key_value_heads": 2}),
    ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.5, "embd_pdrop": 0.0}),
    ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.5}),
    ("opt", {"dropout": 0.5, "layerdrop": 0.0, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    ("opt", {"dropout": 0.0, "layerdrop": 0.5, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    ("phi", {"attention_dropout": 0.0, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
]


def spec_of(path: Path, **overrides: Any) -> LearnerSpec:
    config = make_config(path, ranks=1, stage=0, **overrides)
    return _spec(config, str(path), str(path), False, 10)


@pytest.mark.parametrize(("kind", "options"), WITH_DROPOUT, ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_no_dropout_of_a_checkpoint_is_left_in_training(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=32, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, **options
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = load_hf(spec_of(tmp_path), torch.device("cpu"), Alone(), trained=True).train()
    loaded.config._attn_implementation = "eager"
    ids = torch.arange(12)[None]
    first, *others = (loaded(input_ids=ids, use_cache=False).logits for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
