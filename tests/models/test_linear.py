"""Products by oneDNN, on any machine: the numbers of PyTorch's own, forwards and backwards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.models import linear
from grpo_ray.models.attention import choose_attention
from grpo_ray.models.linear import times_transposed, use_faster_products
from grpo_ray.models.policy import PolicyModel


@pytest.fixture(autouse=True)
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch.backends.mkldnn.is_available()
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


def within_rounding(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (1, 130, 24), (2, 3, 24)])
def test_a_product_is_that_of_float64_within_rounding(shape: tuple[int, ...], strided: bool, bias: bool) -> None:
    torch.manual_seed(0)
    x, b = torch.randn(shape), torch.randn(40) if bias else None
    weight = torch.randn(24, 40).t() if strided else torch.randn(40, 24)
    want = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    within_rounding(times_transposed(x, weight, b), want)


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(24, 40, True), (40, 24, False), (16, 16, True)])
def test_gradients_of_a_layer_are_those_of_float64_within_rounding(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    exact = nn.Linear(inputs, outputs, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    use_faster_products(layer)
    x, grad = torch.randn(1, 1152, inputs, requires_grad=True), torch.randn(1, 1152, outputs)
    x64 = x.detach().double().requires_grad_()
    layer(x).backward(grad)
    exact(x64).backward(grad.double())
    pairs = [
        (x.grad, x64.grad),
        *((p.grad, q.grad) for p, q in zip(layer.parameters(), exact.parameters(), strict=True)),
    ]
    for got, want in pairs:
        assert got is not None
        assert want is not None
        within_rounding(got, want)


def test_frozen_weights_get_no_gradient_and_hand_it_on() -> None:
    layer = nn.Linear(8, 8)
    use_faster_products(layer)
    layer.weight.requires_grad_(False)
    x = torch.randn(1024, 8, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    assert layer.bias.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(1024, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_go_pytorch_s_way(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 4, dtype=dtype)
    x = torch.randn(1024, 8, dtype=dtype)
    want = layer(x)
    use_faster_products(layer)
    assert torch.equal(layer(x), want)


@pytest.mark.parametrize(
    ("num_tokens", "computed"), [(250, 250), (1000, 1024), (1024, 1024), (1025, 1088), (2047, 2048), (3000, 3072)]
)
def test_a_micro_batch_is_filled_up_to_a_multiple_and_its_log_probabilities_are_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, num_tokens: int, computed: int
) -> None:
    """Shapes are few: oneDNN keeps the code that it makes for each."""
    implementation = choose_attention("sdpa", torch.device("cpu"))
    hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation=implementation)
    rng = np.random.default_rng(0)
    lengths = [num_tokens // 10] * 9 + [num_tokens - 9 * (num_tokens // 10)]
    batch = pack(
        [
            PackItem(rng.integers(8, 90, 10), rng.integers(8, 90, n - 9), np.zeros(n - 9, np.float32), 1.0, 1.0, i)
            for i, n in enumerate(lengths)
        ]
    )
    model = PolicyModel(hf, chunk=4096)
    seen: list[int] = []
    hf.base_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    with monkeypatch.context() as m:
        m.setattr(linear, "onednn_is_faster", lambda: False)
        plain, _ = model(batch, 1.0)
    use_faster_products(hf)
    got, _ = model(batch, 1.0)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    assert seen == [num_tokens, computed]


def test_all_linear_layers_of_a_model_take_it_and_it_computes_the_same(tiny_model: Path) -> None:
    ids = torch.arange(10, 138).repeat(8, 1)

    def passes(faster: bool) -> tuple[Tensor, Tensor, int]:
        hf = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        if faster:
            use_faster_products(hf)
        out = hf.model(ids, use_cache=False).last_hidden_state
        out.square().sum().backward()
        grads = [p.grad.flatten() for p in hf.model.parameters() if p.grad is not None]
        calls = sum("Linear" in name for name in _graph(out))
        return out.detach().double(), torch.cat(grads).double(), calls

    (out, grad, calls), (plain_out, plain_grad, plain_calls) = passes(True), passes(False)
    within_rounding(out, plain_out)
    assert (grad - plain_grad).norm() <= 1e-5 * plain_grad.norm()
    layers = AutoModelForCausalLM.from_pretrained(tiny_model).config.num_hidden_layers
    assert (calls, plain_calls) == (7 * layers, 0)


def _graph(out: Tensor) -> list[str]:
    """Names of the backward functions."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return [node.name() for node in seen]
