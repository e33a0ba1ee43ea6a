"""A part of `make models`: families of each kind of layer, and how they are trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from grpo_ray.models.policy import PolicyModel
from tests.models import table
from tests.models.table import MAX_GRADIENT, MAX_NATS, compared

FAMILIES = {
    "llama": "packed",
    "qwen3_moe": "packed",
    "gemma3_text": "packed",
    "deepseek_v3": "packed",
    "doge": "plain",
    "falcon": "plain",
    "bloom": "plain",
    "llama4_text": "plain",
    "lfm2": "plain",
    "mamba2": "plain",
    "falcon_h1": "plain",
    "qwen3_5_text": "plain",
    "bert": "refused",
    "xlm": "refused",
}
"""model_type -> its way. Llama 4 has chunked attention, Doge a mask of its own, others are recurrent or convolutional; XLM sees
what comes after a token, and knows padding by its id."""


@pytest.mark.parametrize(("kind", "way"), FAMILIES.items())
def test_a_family_is_trained_as_its_own_forward_computes_it(kind: str, way: str) -> None:
    row = compared(kind)
    assert row.way == way, row.reason
    assert bool(row.reason) == (way != "packed")
    if way != "refused":
        assert row.nats <= MAX_NATS
        assert row.gradient <= MAX_GRADIENT


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_class_of_transformers_is_trained_wrongly(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if compared_soon(kind) == "wrong"]
    assert wrong == []


def compared_soon(kind: str) -> str:
    try:
        with table.within(table.LIMIT_S):
            return compared(kind).way
    except Exception:
        return "not made"


def test_what_is_trained_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check at load sees no parameter's gradient: the table does."""

    class Half(PolicyModel):
        def __init__(self, hf: nn.Module, **options: object) -> None:
            super().__init__(hf, **options)  # type: ignore[arg-type]
            weight = hf.get_submodule("model.layers.0.mlp.up_proj").weight
            assert isinstance(weight, torch.Tensor)
            weight.register_hook(lambda grad: grad / 2)

    monkeypatch.setattr(table, "PolicyModel", Half)
    assert compared("llama").way == "wrong"
