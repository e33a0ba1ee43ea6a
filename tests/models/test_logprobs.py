"""The chunked head against log_softmax; and its gradients with what the loss tells it beforehand, against those without."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from grpo_ray.batch.slopes import Slopes
from grpo_ray.batch.truncation import TokenSets
from grpo_ray.models import logprobs
from grpo_ray.models.logprobs import LogprobHead, chunked_logprobs
from grpo_ray.types import Truncation

N, H, V = 37, 16, 53


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g, dtype=dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=g, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=g)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logp = (nn.functional.linear(hidden, weight, bias).float() / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("terms", ["logp", "entropy", "both"])
def test_values_and_gradients_equal_the_plain_ones(chunk: int, temperature: float, terms: str) -> None:
    hidden, weight, bias, targets = inputs()
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(N, generator=g), torch.randn(N, generator=g)

    def total(pair: tuple[Tensor, Tensor]) -> Tensor:
        parts = {"logp": (a * pair[0]).sum(), "entropy": (b * pair[1]).sum()}
        return parts[terms] if terms in parts else parts["logp"] + parts["entropy"]

    got = chunked_logprobs(hidden, weight, bias, targets, temperature=temperature, chunk=chunk)
    want = plain(hidden, weight, bias, targets, temperature)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    got_grads = torch.autograd.grad(total(got), (hidden, weight, bias))
    want_grads = torch.autograd.grad(total(want), (hidden, weight, bias))
    for x, y in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_each_value_is_the_same_for_any_chunk() -> None:
    hidden, weight, _, targets = inputs(torch.float64)
    whole = chunked_logprobs(hidden, weight, None, targets, temperature=1.0, chunk=N)
    for chunk in (1, 5, 36):
        parts = chunked_logprobs(hidden, weight, None, targets, temperature=1.0, chunk=chunk)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_bf16_gradients_are_as_good_as_the_plain_ones() -> None:
    hidden, weight, _, targets = inputs()
    exact = torch.autograd.grad(plain(hidden, weight, None, targets, 1.0)[0].sum(), (hidden, weight))
    h, w = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    ours = torch.autograd.grad(chunked_logprobs(h, w, None, targets, temperature=1.0, chunk=8)[0].sum(), (h, w))
    theirs = torch.autograd.grad(plain(h, w, None, targets, 1.0)[0].sum(), (h, w))
    for mine, other, want in zip(ours, theirs, exact, strict=True):
        assert (mine.float() - want).norm() <= 1.1 * (other.float() - want).norm()


def test_logits_of_a_bf16_model_are_not_rounded_to_bf16() -> None:
    """Of logits of 16 to 32, as those of trained models, that would cost 0.03 nats a token: an eighth of a bit in eight."""
    g = torch.Generator().manual_seed(3)
    hidden = (8 * torch.randn(200, 64, generator=g)).bfloat16()
    weight = (torch.randn(90, 64, generator=g) / 2).bfloat16()
    bias = torch.randn(90, generator=g).bfloat16()
    targets = nn.functional.linear(hidden, weight, bias).argmax(-1)
    exact, _ = plain(hidden.double(), weight.double(), bias.double(), targets, 1.3)
    got, _ = chunked_logprobs(hidden, weight, bias, targets, temperature=1.3, chunk=64)
    rounded, _ = plain(hidden, weight, bias, targets, 1.3)
    assert got.dtype == torch.float32
    assert float((got - exact).abs().max()) < 1e-4
    assert float((rounded - exact).abs().mean()) > 1e-3


def test_the_head_shares_the_weight_and_still_gives_logits() -> None:
    linear = nn.Linear(H, V, bias=False)
    head = LogprobHead(linear)
    hidden = torch.randn(2, 3, H)
    assert head.weight is linear.weight
    torch.testing.assert_close(head(hidden), linear(hidden))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_both_terms_are_those_of_finite_differences(temperature: float) -> None:
    hidden, weight, bias, targets = inputs(torch.float64)
    small = [x.detach()[:6].clone().requires_grad_() for x in (hidden, weight, bias)]

    def both(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_logprobs(hidden, weight, bias, targets[:6] % 6, temperature=temperature, chunk=4)

    assert torch.autograd.gradcheck(both, small)


class Products:
    """The number of times that logits are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        product = logprobs._product

        def counted(*args: Tensor | None) -> Tensor:
            self.number += 1
            return product(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(logprobs, "_product", counted)


def squared_loss(logp: Tensor, wanted: Tensor) -> Tensor:
    return ((logp - wanted) ** 2).sum()


def slopes_of_squared_loss(wanted: Tensor) -> Slopes:
    return lambda rows, logp: 2 * (logp - wanted[rows])


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_taken_with_the_logits_are_the_same_and_spare_them_the_second_time(
    cut: bool, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias, targets = inputs(torch.float64)
    wanted = torch.randn(N, generator=torch.Generator().manual_seed(2))
    grads = []
    for slopes in (None, slopes_of_squared_loss(wanted)):
        products = Products(monkeypatch)
        logp, _ = chunked_logprobs(
            hidden,
            weight,
            bias,
            targets,
            temperature=0.7,
            chunk=8,
            sets=TokenSets(Truncation(top_k=5)) if cut else None,
            slopes=slopes,
        )
        grads.append(torch.autograd.grad(factor * squared_loss(logp, wanted), (hidden, weight, bias)))
        assert products.number == (10 if slopes is None else 5)
    for without, told in zip(*grads, strict=True):
        torch.testing.assert_close(told, without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", ["one derivative", "sign of one", "one that is 0", "all zero", "nan", "entropy too"])
def test_what_was_told_wrongly_of_a_loss_does_not_count(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs()
    right = slopes_of_squared_loss(torch.zeros(N))

    def told(rows: slice, logp: Tensor) -> Tensor:
        slope = right(rows, logp)
        if wrong == "all zero":
            slope.zero_()
        elif wrong != "entropy too" and rows.start == 0:
            slope[3] *= {"one derivative": 1.001, "sign of one": -1.0, "one that is 0": 0.0, "nan": math.nan}[wrong]
        return slope

    def gradients(slopes: Slopes | None) -> tuple[Tensor, ...]:
        logp, entropy = chunked_logprobs(hidden, weight, bias, targets, temperature=1.0, chunk=8, slopes=slopes)
        if wrong == "one that is 0":
            logp = torch.cat([logp[:7].detach(), logp[7:]])
        loss = squared_loss(logp, torch.zeros(N)) + (0.1 * entropy.sum() if wrong == "entropy too" else 0.0)
        return torch.autograd.grad(loss, (hidden, weight, bias))

    products = Products(monkeypatch)
    got = gradients(told)
    assert products.number == 10
    for mine, want in zip(got, gradients(None), strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=0)


def test_a_loss_without_a_derivative_gives_no_gradient() -> None:
    hidden, weight, _, targets = inputs()
    logp, _ = chunked_logprobs(
        hidden, weight, None, targets, temperature=1.0, chunk=8, slopes=lambda _, logp: torch.zeros_like(logp)
    )
    for gradient in torch.autograd.grad((0 * logp).sum(), (hidden, weight)):
        assert float(gradient.abs().max()) == 0.0


def test_gradients_taken_with_the_logits_of_a_bf16_model_have_its_dtype() -> None:
    hidden, weight, _, targets = (
        x.detach().bfloat16().requires_grad_() if x.is_floating_point() else x for x in inputs()
    )
    grads = []
    for slopes in (None, lambda rows, logp: torch.ones_like(logp)):
        logp, _ = chunked_logprobs(hidden, weight, None, targets, temperature=1.0, chunk=8, slopes=slopes)
        grads.append(torch.autograd.grad(logp.sum(), (hidden, weight)))
    assert {g.dtype for g in grads[1]} == {torch.bfloat16}
    for without, told in zip(*grads, strict=True):
        torch.testing.assert_close(told, without, rtol=0, atol=0)
