"""A path is compared with the model's own forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2ForCausalLM

from grpo_ray.batch.sequence import Alone
from grpo_ray.models.attention import PACKED, choose_attention
from grpo_ray.models.checks.agreement import Gap, _rows_of, gap_of
from grpo_ray.models.plain import use_own_attention
from grpo_ray.models.policy import PolicyModel
from grpo_ray.models.reward import RewardModel
from tests.models.small import small_config, small_model

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _packed() -> None:
    choose_attention("sdpa", torch.device("cpu"))


def policy(kind: str, dtype: torch.dtype = torch.float32, *, plain: bool = False, **options: Any) -> PolicyModel:
    hf = small_model(small_config(kind, **options), None if plain else PACKED)
    return PolicyModel(hf.to(dtype), chunk=16, plain=plain).train()


def gap(model: PolicyModel | RewardModel) -> Gap:
    return gap_of(model, share_prompts=not model.plain)


class Scaled(Qwen2ForCausalLM):
    """Nothing in its config says that its logits are twice as large."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class BothWays(Qwen2ForCausalLM):
    """A token sees the next one's embedding."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.get_input_embeddings()(input_ids)
        after = nn.functional.pad(embedded[:, 1:], (0, 0, 0, 1), value=1.0)
        return super().forward(inputs_embeds=embedded + after, **kwargs)


@DTYPES
@pytest.mark.parametrize(
    ("kind", "plain"),
    [("qwen2", False), ("qwen2", True), ("qwen3_moe", False), ("gemma3_text", False), ("qwen3_next", True)],
)
def test_a_right_path_differs_by_rounding_alone(kind: str, plain: bool, dtype: torch.dtype) -> None:
    found = gap(policy(kind, dtype, plain=plain))
    assert found.closes(dtype), found
    assert found.values > 0


@DTYPES
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_a_class_that_scales_its_logits_is_caught(plain: bool, dtype: torch.dtype) -> None:
    model = policy("qwen2", dtype, plain=plain)
    model.hf.__class__ = Scaled
    found = gap(model)
    assert not found.closes(dtype)
    assert found.values > 0.01
    assert "log-probabilities are off by" in str(found)


@DTYPES
@pytest.mark.parametrize("plain", [False, True], ids=["packed", "plain"])
def test_a_model_that_is_another_in_training_is_caught(plain: bool, dtype: torch.dtype) -> None:
    model: Any = policy("qwen2", dtype, plain=plain)
    model.hf.model.layers[0].mlp.register_forward_hook(
        lambda module, _args, out: nn.functional.dropout(out, 0.2, module.training)
    )
    assert not gap(model).closes(dtype)
    # Where dropout is wanted (learner.dropout) the rest is compared.
    assert gap_of(model, share_prompts=not plain, training=False).closes(dtype)
    assert model.training


def test_a_model_that_sees_what_comes_after_a_token_is_caught_on_the_plain_path() -> None:
    model = policy("qwen2", plain=True)
    model.hf.__class__ = BothWays
    assert not gap(model).closes(torch.float32)


@DTYPES
@pytest.mark.parametrize("kind", ["mamba2", "qwen3_next"])
def test_a_model_whose_packed_sequences_see_each_other_is_caught(kind: str, dtype: torch.dtype) -> None:
    model = policy(kind, dtype)
    assert not gap(model).closes(dtype)
    use_own_attention(model.hf)
    model.plain = True
    assert gap(model).closes(dtype)


def test_a_wrong_gradient_alone_is_caught() -> None:
    model: Any = policy("qwen2")
    model.hf.model.layers[1].mlp.register_forward_hook(
        lambda module, _args, out: out.detach() if module.training else None
    )
    found = gap(model)
    assert found.values < 1e-5
    assert found.gradient > 0.01
    assert not found.closes(torch.float32)


def test_why_a_path_computes_nothing_is_told() -> None:
    model: Any = policy("qwen2")
    model.hf.model.layers[0].self_attn.forward = lambda *_, **__: 1 / torch.zeros(2, 3).mm(torch.zeros(2, 3))
    found = gap(model)
    assert not found.closes(torch.float32)
    assert str(found).startswith("RuntimeError: ")


def test_a_reward_model_is_compared_by_its_scores() -> None:
    from transformers import AutoModelForSequenceClassification

    def scored(attention: str | None, plain: bool) -> RewardModel:
        torch.manual_seed(0)
        config = small_config("qwen2", num_labels=1)
        hf = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
        return RewardModel(hf, plain=plain).train()

    assert gap(scored(PACKED, False)).closes(torch.float32)
    assert gap(scored(None, True)).closes(torch.float32)
    wrong: Any = scored(PACKED, False)
    wrong.hf.score.register_forward_hook(lambda module, _args, out: out * (1.5 if module.training else 1.0))
    assert not gap(wrong).closes(torch.float32)


def test_a_comparison_leaves_no_trace() -> None:
    model: Any = policy("qwen2")
    model.hf.gradient_checkpointing_enable({"use_reentrant": True})
    hooks = len(model.hf.get_input_embeddings()._forward_hooks)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert gap(model).closes(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(layer.gradient_checkpointing for layer in model.hf.model.layers)
    assert model.hf.config._attn_implementation == PACKED
    assert len(model.hf.get_input_embeddings()._forward_hooks) == hooks


def test_each_rank_is_compared_in_its_own_slice() -> None:
    own_NH = torch.arange(1.0, 6.0)[:, None]
    first, second, alone = Alone(), Alone(), Alone()
    first.size = second.size = 2
    second.rank = 1
    assert _rows_of(own_NH, 3, first)[:, 0].tolist() == [1, 2, 3]
    assert _rows_of(own_NH, 3, second)[:, 0].tolist() == [4, 5, 0]
    assert _rows_of(own_NH, 8, alone)[:, 0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    # What one rank computes of the whole, as for rounding.
    assert _rows_of(own_NH, 5, second) is own_NH


def test_rounding_is_measured_in_the_dtype_of_the_model() -> None:
    fine, coarse = (gap(policy("qwen2", dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert fine.rounding[0] < 1e-5 < 1e-3 < coarse.rounding[0] < 0.1
