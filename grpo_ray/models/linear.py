"""Products with fp32 weight matrices on CPUs, by the faster of the two libraries in PyTorch.

PyTorch multiplies fp32 matrices by MKL, which has only 256-bit kernels for AMD's processors, whatever they support. oneDNN, which
PyTorch uses for bf16, has 512-bit ones for all: twice as fast if a core is as wide (Zen 5: 250 GFLOP/s instead of 110).

oneDNN compiles code for every shape and keeps it, which fragments its heap: so it gets few shapes, 16 numbers of tokens between a
power of two and the next.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_FEWEST = 256
"""The number of tokens from which oneDNN is used. Below it both libraries take equally long."""


def multiple_of_tokens(num_tokens: int, device: torch.device) -> int:
    """The number whose multiple the number of tokens should be for the faster products: at most a sixteenth of it."""
    return _step(num_tokens) if num_tokens >= _FEWEST and device.type == "cpu" and onednn_is_faster() else 1


def _step(num_tokens: int) -> int:
    return 1 << (num_tokens.bit_length() - 5)


def times_transposed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, without a gradient.

    Args:
        x: [.., I]; it is copied if it is not contiguous.
        weight: [O, I], of any strides.
        bias: [O] or None.

    Returns:
        [.., O].
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512."""
    cpuinfo = Path("/proc/cpuinfo")
    amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_faster_products(model: nn.Module) -> None:
    """Use the faster products in all linear layers of a model, if this machine has them."""
    if onednn_is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FasterLinear


class FasterLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        num_tokens = x.numel() // self.in_features
        regular = num_tokens >= _FEWEST and num_tokens % _step(num_tokens) == 0
        if not regular or x.dtype != torch.float32 or x.device.type != "cpu":
            return super().forward(x)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)
        return out


class _Linear(torch.autograd.Function):
    """The autograd function of a linear layer. Its weight stays on `ctx` as a Parameter and is not saved for backward: ZeRO-3 swaps
    `param.data` between the passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return times_transposed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_NO, x_NI = grad.flatten(0, -2), ctx.saved_tensors[0].flatten(0, -2)
        return (
            times_transposed(grad, ctx.weight.t()) if need_x else None,
            _weight_gradient(grad_NO, x_NI) if need_weight else None,
            grad_NO.sum(0) if need_bias else None,
        )


def _weight_gradient(grad_NO: Tensor, x_NI: Tensor) -> Tensor:
    """The weight's gradient, [O, I]. oneDNN copies the first factor, so the narrower one comes first."""
    if grad_NO.shape[1] > x_NI.shape[1]:
        return times_transposed(x_NI.t(), grad_NO.t()).t()
    return times_transposed(grad_NO.t(), x_NI.t())
