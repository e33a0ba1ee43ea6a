"""Adapters, against peft itself: the merged weights, the switch, the folder that others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from grpo_ray.config.model import LoraConfig
from grpo_ray.errors import ConfigError
from grpo_ray.models.lora import adapter_bytes, adapter_checksum, adapter_tensors, adapters_off, inject, write_adapter
from grpo_ray.models.named_weights import buckets, named_weights

LORA = LoraConfig(r=4, alpha=12)
IDS = torch.arange(10, 30)[None]


@pytest.fixture
def adapted(tiny_model: Path) -> Any:
    """A model whose adapters do something."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    inject(model, LORA)
    torch.manual_seed(1)
    for tensor in adapter_tensors(model).values():
        torch.nn.init.normal_(tensor, std=0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def test_only_adapters_are_trained_and_every_linear_layer_has_one(adapted: Any) -> None:
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert all("lora_" in n for n in trained)


def test_merged_weights_have_the_plain_names_and_compute_what_the_adapters_do(adapted: Any, tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert [w.name for w in named_weights(adapted)] == [n for n, _ in plain.named_parameters()]
    before = logits(plain)
    plain.load_state_dict({w.name: w.value() for w in named_weights(adapted)}, strict=False)
    assert (logits(adapted) - before).abs().max() > 0.1
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=0, atol=2e-5)


def test_switched_off_they_leave_the_bare_model_and_the_gradients_alone(adapted: Any, tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    with adapters_off(adapted):
        assert torch.equal(logits(adapted), logits(plain))
        assert all(p.requires_grad for p in adapter_tensors(adapted).values())
    assert not torch.equal(logits(adapted), logits(plain))


def test_an_error_while_they_are_off_leaves_them_on(adapted: Any) -> None:
    """A reference pass that fails, of which the run goes on."""
    before = logits(adapted)
    with pytest.raises(RuntimeError, match="out of memory"), adapters_off(adapted):
        raise RuntimeError("out of memory")
    assert torch.equal(logits(adapted), before)


def test_peft_loads_the_written_adapter(adapted: Any, tiny_model: Path, tmp_path: Path) -> None:
    write_adapter({n: p.detach() for n, p in adapter_tensors(adapted).items()}, LORA, str(tiny_model), tmp_path)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


def test_the_bytes_of_an_adapter_read_back_and_their_checksum_sees_one_bit(adapted: Any) -> None:
    tensors = {n: p.detach() for n, p in adapter_tensors(adapted).items()}
    data = adapter_bytes(tensors)
    assert all(torch.equal(t, tensors[n]) for n, t in load(data).items())
    assert adapter_bytes(dict(reversed(tensors.items()))) == data
    flipped = data[:-1] + bytes([data[-1] ^ 1])
    assert len({adapter_checksum(data), adapter_checksum(flipped)}) == 2


def test_a_layer_that_is_not_there_is_named(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(ConfigError, match="query_projection"):
        inject(model, LoraConfig(target_modules=("query_projection",)))


@pytest.mark.parametrize("limit", [1, 40_000, 1 << 40])
def test_buckets_hold_every_weight_once_in_order(adapted: Any, limit: int) -> None:
    weights = named_weights(adapted)
    parts = list(buckets(weights, limit))
    assert [w.name for part in parts for w in part] == [w.name for w in weights]
    sizes = [sum(w.shape.numel() * 4 for w in part) for part in parts]
    assert all(size <= limit or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
