"""What models do to their logits: measured, and the same in the chunked head as in their own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from grpo_ray.batch.pack import pack
from grpo_ray.batch.truncation import TokenSets, keep_mask
from grpo_ray.config.model import LoraConfig
from grpo_ray.models.features.logits import LogitMap, logit_map
from grpo_ray.models.logprobs import chunked_logprobs
from grpo_ray.models.lora import inject
from grpo_ray.models.policy import PolicyModel, check_head
from grpo_ray.types import Truncation
from tests.models.random_models import gradients, own_logps, ragged, random_config, random_model

N, H, V = 21, 12, 40
MAPS = [LogitMap(cap=3.0), LogitMap(scale=0.25), LogitMap(scale=-1.5, cap=2.0), LogitMap(cap=5.0, size=33)]
ITEMS = ragged([(3, 5), (1, 9), (4, 2), (3, 5)])


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((N, H), (V, H), (V,)))
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), torch.arange(N) % 33


def plain(tensors: tuple[Tensor, ...], found: LogitMap, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    hidden, weight, bias, targets = tensors
    logits = found.scale * nn.functional.linear(hidden, weight, bias)[:, : found.size]
    if found.cap is not None:
        logits = found.cap * torch.tanh(logits / found.cap)
    logits = logits / temperature
    if top_p < 1:
        kept = keep_mask(logits.detach(), targets, Truncation(top_p=top_p, top_k=0, min_p=0.0))
        logits = logits.masked_fill(~kept, -1e30)
    logp = logits.log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("found", MAPS)
@pytest.mark.parametrize("chunk", [1, 8, 100])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8)])
def test_values_and_gradients_of_mapped_logits_are_the_plain_ones(
    found: LogitMap, chunk: int, temperature: float, top_p: float
) -> None:
    tensors = inputs()
    sets = TokenSets(Truncation(top_p=top_p, top_k=0, min_p=0.0)) if top_p < 1 else None
    got = chunked_logprobs(*tensors, temperature=temperature, chunk=chunk, sets=sets, logit_map=found)
    want = plain(tensors, found, temperature, top_p)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-9)
    a, b = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got_grads, want_grads = (torch.autograd.grad((a * x + b * y).sum(), tensors[:3]) for x, y in (got, want))
    torch.testing.assert_close(got_grads, want_grads, atol=1e-9, rtol=1e-9)


def test_a_capped_logit_at_its_cap_has_no_gradient_and_no_nan() -> None:
    hidden = torch.full((2, H), 100.0).requires_grad_()
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(2)).requires_grad_()
    sets = TokenSets(Truncation(top_p=0.5, top_k=0, min_p=0.0))
    logp, entropy = chunked_logprobs(
        hidden, weight, None, torch.arange(2), temperature=1.0, chunk=8, sets=sets, logit_map=LogitMap(cap=2.0)
    )
    (logp + entropy).sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert float(hidden.grad.abs().max()) == float(weight.grad.abs().max()) == 0.0


class _Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        self.elements = max(
            [self.elements, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))]
        )
        return out


def test_no_more_logits_than_a_chunks_ever_exist() -> None:
    hidden, weight = torch.randn(200, 4).requires_grad_(), torch.randn(300, 4).requires_grad_()
    with _Largest() as largest:
        logp, entropy = chunked_logprobs(
            hidden, weight, None, torch.arange(200), temperature=0.7, chunk=9, logit_map=LogitMap(0.5, 3.0)
        )
        (logp + entropy).sum().backward()
    assert largest.elements == 9 * 300


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("qwen2", {}, LogitMap()),
        ("cohere", {"logit_scale": 0.3}, LogitMap(scale=0.3)),
        ("cohere2", {"logit_scale": 3.0}, LogitMap(scale=3.0)),
        ("granite", {"logits_scaling": 3.0}, LogitMap(scale=round(1 / 3, 12))),
        ("hyperclovax", {"logits_scaling": 0.2}, LogitMap(scale=0.2)),
        ("minicpm3", {"dim_model_base": 8}, LogitMap(hidden_scale=0.25)),
        ("gemma3_text", {"final_logit_softcapping": 2.5}, LogitMap(cap=2.5)),
        ("nanochat", {"final_logit_softcapping": 4.0}, LogitMap(cap=4.0)),
        ("modernbert-decoder", {"classifier_bias": True, "norm_bias": True}, LogitMap(layers=("lm_head",))),
    ],
)
def test_the_head_computes_what_the_models_own_forward_does(
    kind: str, options: dict[str, Any], expected: LogitMap
) -> None:
    alone = random_model(kind, attention="eager", **options)
    want = own_logps(alone, ITEMS, 0.8)
    policy = PolicyModel(random_model(kind, **options), chunk=6)
    assert policy.logit_map == expected
    got, _ = policy(pack(ITEMS), 0.8)
    # Transformers' norms compute in fp32, whatever the model does.
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(gradients(policy, got), gradients(alone, want), atol=1e-5, rtol=1e-5)


class _Scaled(LlamaForCausalLM):
    """Its config names nothing of what it does."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.changed(self.lm_head(hidden)))

    def changed(self, logits: Tensor) -> Tensor:
        return 0.7 * logits


class _Shifted(_Scaled):
    def changed(self, logits: Tensor) -> Tensor:
        return logits - 0.1 * logits.mean(-1, keepdim=True)


class _Squared(_Scaled):
    def changed(self, logits: Tensor) -> Tensor:
        return logits * logits.abs()


class _WithoutItsHead(_Scaled):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.t())


@contextmanager
def no_memory() -> Iterator[None]:
    with torch.device("meta"):
        yield


def test_a_scale_that_no_option_names_is_found() -> None:
    with no_memory():
        model = _Scaled(random_config("llama"))
    assert logit_map(model) == LogitMap(scale=0.7)


@pytest.mark.parametrize("odd", [_Shifted, _Squared, _WithoutItsHead])
def test_a_change_that_the_head_lacks_is_refused(odd: type[nn.Module]) -> None:
    with no_memory():
        model = odd(random_config("llama", odd_logit_scale=0.3))
    with pytest.raises(ValueError, match=rf"{odd.__name__} (changes its logits.*odd_logit_scale|does more than call)"):
        check_head(model)


def test_adapters_on_the_output_layer_are_refused_rather_than_left_out() -> None:
    model = random_model("llama")
    inject(model, LoraConfig(r=2, target_modules=("lm_head",)))
    with pytest.raises(ValueError, match=r"no plain linear output layer \(but peft"):
        PolicyModel(model, chunk=8)


def test_the_measurement_leaves_the_model_as_it_was() -> None:
    model = random_model("modernbert-decoder", attention="eager")
    before = own_logps(model, ITEMS)
    logit_map(model)
    assert torch.equal(own_logps(model, ITEMS), before)
    assert not any("forward" in vars(module) for module in model.modules())
