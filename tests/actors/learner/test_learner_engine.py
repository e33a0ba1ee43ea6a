"""What a learner's engine is made of, before DeepSpeed has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.learner.build import LearnerSpec, can_share_prompts, load_hf
from actors.learner.group import _spec
from grpo_ray.batch.pack import pack
from grpo_ray.batch.sequence import Alone
from grpo_ray.models.policy import PolicyModel
from tests.actors.learner.test_learner import make_config
from tests.models.random_models import ragged, random_config, random_model
from tests.models.test_rope import MODELS

NOISY = ("qwen2", "gpt2", "opt", "phi", "gpt_neox", "starcoder2", "mixtral", "phimoe")
"""Families whose modules drop values, layers or add jitter: by modules, by functions, by the rates of attributes and of configs."""


def spec_of(path: Path, **overrides: Any) -> LearnerSpec:
    config = make_config(path, ranks=1, stage=0, **overrides)
    return _spec(config, str(path), str(path), False, 10)


def noisy_checkpoint(kind: str, folder: Path) -> Path:
    """A random model whose config.json asks for as much noise as it can."""
    config = random_config(kind)
    rates = [n for n, v in vars(config).items() if re.search("drop|jitter|noise", n) and isinstance(v, int | float)]
    assert rates
    for name in rates:
        setattr(config, name, 0.5)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def logits_in_training(folder: Path, **overrides: Any) -> list[torch.Tensor]:
    loaded = load_hf(spec_of(folder, **overrides), torch.device("cpu"), Alone(), trained=True).eval().train()
    loaded.config._attn_implementation = "eager"
    return [loaded(input_ids=torch.arange(3, 15)[None], use_cache=False).logits for _ in range(2)]


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.parametrize("recomputes", [False, True])
def test_a_model_in_training_computes_bit_for_bit_what_its_checkpoint_does_in_evaluation(
    kind: str, recomputes: bool, tmp_path: Path
) -> None:
    noisy_checkpoint(kind, tmp_path)
    alone: Any = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    want = alone(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    for got in logits_in_training(tmp_path, model={"gradient_checkpointing": recomputes}):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "phimoe"])
def test_noise_is_kept_for_those_who_want_it(kind: str, tmp_path: Path) -> None:
    first, second = logits_in_training(noisy_checkpoint(kind, tmp_path), learner={"dropout": True})
    assert float((first - second).abs().max()) > 1e-3


def test_layers_recompute_their_activations_without_noise_as_with_it(tmp_path: Path) -> None:
    spec = spec_of(noisy_checkpoint("qwen2", tmp_path), model={"gradient_checkpointing": True})
    loaded = load_hf(spec, torch.device("cpu"), Alone(), trained=True).train()
    assert [layer.training for layer in loaded.model.layers] == [True, True]
    assert not loaded.model.layers[0].self_attn.training
    assert not loaded.base_model.train().norm.training


@pytest.mark.parametrize(("kind", "options"), [*MODELS, ("llama", {})], ids=["longrope", "dynamic", "usual"])
@torch.no_grad()
def test_a_sample_is_computed_as_if_alone_where_positions_depend_on_lengths(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = random_model(kind, dtype=torch.float32, attention="eager", **options)
    model.save_pretrained(tmp_path)
    spec = spec_of(tmp_path)
    loaded = load_hf(spec, torch.device("cpu"), Alone(), trained=True)
    assert can_share_prompts(spec, loaded) is (options == {})
    policy, (short, long) = PolicyModel(loaded, chunk=16), ragged([(3, 5), (4, 20)])
    together, _ = policy(pack([short, long]), 1.0)
    torch.testing.assert_close(policy(pack([short]), 1.0)[0], together[:5], atol=1e-5, rtol=1e-5)
