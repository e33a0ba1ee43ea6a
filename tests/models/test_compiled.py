"""Compiled decoder layers against the same model as it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from grpo_ray.batch.pack import PackedBatch, PackItem, pack
from grpo_ray.errors import ConfigError
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.compiled import compile_layers
from grpo_ray.models.policy import PolicyModel

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


def packed(seed: int, lengths: list[int]) -> PackedBatch:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(8, 200, 5).astype(np.int32)
    items = []
    for number, length in enumerate(lengths):
        ids, logps = rng.integers(8, 200, length).astype(np.int32), np.zeros(length, np.float32)
        items.append(PackItem(prompt, ids, logps, 1.0, 1.0, number))
    return pack(items, share_prompts=True)


def gradient(model: PolicyModel, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logps_C, entropy_C = model(batch, 0.8)
    (logps_C.sum() + entropy_C.sum()).backward()
    return logps_C.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=choose_attention("auto", CPU)
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_compute_the_same_and_are_compiled_once_for_all_lengths(backend: str, loaded: Any) -> None:
    plain, compiled = (PolicyModel(copy.deepcopy(loaded), chunk=64) for _ in range(2))
    compile_layers(compiled.hf, backend)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    torch.compiler.reset()
    counters.clear()
    frames = []
    for seed, lengths in enumerate(([9, 30, 4], [17, 3], [40, 41, 12, 2])):
        batch = packed(seed, lengths)
        want_C, want = gradient(plain, batch)
        got_C, got = gradient(compiled, batch)
        torch.testing.assert_close(got_C, want_C, rtol=1e-5, atol=1e-5)
        assert got.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=f"the gradients of {name} differ")
        frames.append(counters["frames"]["ok"])
    assert frames[0] > 0, "nothing was compiled"
    assert frames[-1] == frames[0], "compiled anew for other lengths"


def test_a_model_whose_layers_are_not_known_is_refused(loaded: Any) -> None:
    odd = copy.deepcopy(loaded)
    odd._no_split_modules = None
    with pytest.raises(ConfigError, match=r"model\.compile: Qwen2ForCausalLM does not say"):
        compile_layers(odd)
