"""Hidden states -> log-probabilities and entropy, without ever holding the logits of all tokens at once.

N tokens, H hidden size, V vocabulary, C rows of a chunk. Peak memory is a few [C, V] buffers in fp32 plus the gradient
of the weight; the naive way holds several [N, V] (at V = 152k and N = 4,096: 7 GB against 1).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_ray.batch.slopes import Slopes
from grpo_ray.batch.truncation import TokenSets
from grpo_ray.models.features.logits import PLAIN, LogitMap

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_SAME = 1e-5
"""The relative difference up to which derivatives of the loss are taken for the same."""


class _ChunkedLogprobs(torch.autograd.Function):
    """The autograd function that recomputes the logits of a chunk in the backward pass; unless the derivatives of the loss are
    known with the log-probabilities, so that the gradients can be taken while the logits are there (as fused linear cross-entropy
    does, Liger Kernel 2410.10989, section 3.2). These count only if the backward pass gets the same derivatives.

    The weight stays on `ctx` as a Parameter and is not saved for backward: ZeRO-3 swaps `param.data` between the
    passes, and a saved tensor would keep the gathered weight alive, or be the empty one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Float[Tensor, "N H"],
        weight_VH: Float[Tensor, "V H"],
        bias_V: Float[Tensor, "V"] | None,
        targets_N: Int[Tensor, "N"],
        temperature: float,
        chunk: int,
        sets: TokenSets | None,
        logit_map: LogitMap,
        slopes: Slopes | None,
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
        num = hidden_NH.shape[0]
        logp_N = torch.empty(num, dtype=_precision(hidden_NH), device=hidden_NH.device)
        lse_N, entropy_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        factor_VH, addend_V = _used(weight_VH, bias_V, logit_map)
        early = None
        if slopes is not None and num and logit_map.cap is None and any(ctx.needs_input_grad):
            early = _Gradients(ctx, hidden_NH, weight_VH, bias_V)
            slope_N = torch.empty_like(logp_N)
        for a in range(0, num, chunk):
            rows = slice(a, min(a + chunk, num))
            logits_CV = _over(logit_map.apply_(_product(hidden_NH[rows], factor_VH, addend_V)), temperature)
            if sets is not None:
                sets.drop(logits_CV, targets_N[rows], a)
            lse_C = logits_CV.logsumexp(-1)
            lse_N[rows] = lse_C
            logp_CV = logits_CV.sub_(lse_C[:, None])
            logp_N[rows] = logp_CV.gather(-1, targets_N[rows, None]).squeeze(-1)
            probs_CV = logp_CV.exp()
            entropy_N[rows] = -logp_CV.mul_(probs_CV).sum(-1)
            if early is not None and slopes is not None:
                slope_N[rows] = slopes(rows, logp_N[rows])
                grad_CV = _through_softmax(probs_CV, targets_N[rows], slope_N[rows])
                early.add(rows, grad_CV, factor_VH, logit_map, temperature)
        if sets is not None:
            sets.made = True
        ctx.save_for_backward(hidden_NH, targets_N, lse_N, entropy_N)
        ctx.weight, ctx.bias, ctx.temperature, ctx.chunk, ctx.sets = weight_VH, bias_V, temperature, chunk, sets
        ctx.logit_map = logit_map
        ctx.early, ctx.slope_N = early, None if early is None else slope_N
        ctx.set_materialize_grads(False)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logp_N, grad_entropy_N = grads
        hidden_NH, targets_N, lse_N, entropy_N = ctx.saved_tensors
        weight, bias, logit_map = ctx.weight, ctx.bias, ctx.logit_map
        early: _Gradients | None = ctx.early
        ctx.early = None
        if early is not None and grad_entropy_N is None and grad_logp_N is not None:
            factor = _common_factor(grad_logp_N, ctx.slope_N)
            if factor is not None:
                return early.times(factor)
        del early
        factor_VH, addend_V = _used(weight, bias, logit_map)
        gradients = _Gradients(ctx, hidden_NH, weight, bias)
        for a in range(0, hidden_NH.shape[0], ctx.chunk):
            rows = slice(a, min(a + ctx.chunk, hidden_NH.shape[0]))
            mapped_CV = logit_map.apply_(_product(hidden_NH[rows], factor_VH, addend_V))
            slope_CV = logit_map.slope(mapped_CV)
            logits_CV = _over(mapped_CV, ctx.temperature)
            if ctx.sets is not None:
                ctx.sets.drop(logits_CV, targets_N[rows], a)
            grad_CV = _grad_logits(
                logits_CV,
                targets_N[rows],
                lse_N[rows],
                entropy_N[rows],
                None if grad_logp_N is None else grad_logp_N[rows],
                None if grad_entropy_N is None else grad_entropy_N[rows],
            )
            if slope_CV is not None:
                grad_CV.mul_(slope_CV)
            gradients.add(rows, grad_CV, factor_VH, logit_map, ctx.temperature)
        return gradients.times(1.0)


class _Gradients:
    """The gradients of hidden states, weight and bias, as far as they are needed, summed over chunks in fp32: bf16 would lose the
    small addends."""

    def __init__(self, ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        self._of = (hidden_NH, weight_VH, bias_V)
        self._hidden_NH = torch.empty_like(hidden_NH) if need_hidden else None
        self._weight_VH = _zeros(weight_VH) if need_weight else None
        self._bias_V = _zeros(bias_V) if need_bias and bias_V is not None else None

    def add(self, rows: slice, grad_CV: Tensor, factor_VH: Tensor, logit_map: LogitMap, temperature: float) -> None:
        """Add those of a chunk, given the gradient by its logits over the temperature (before a cap), which is overwritten."""
        if temperature != logit_map.scale:
            grad_CV.mul_(logit_map.scale / temperature)
        if self._bias_V is not None:
            self._bias_V[: logit_map.size] += grad_CV.sum(0)
        grad_CV = grad_CV.to(factor_VH.dtype)
        if self._hidden_NH is not None:
            self._hidden_NH[rows] = grad_CV @ factor_VH
        if self._weight_VH is not None:
            self._weight_VH[: logit_map.size] += grad_CV.t() @ self._of[0][rows].to(factor_VH.dtype)

    def times(self, factor: float) -> tuple[Tensor | None, ...]:
        """What the backward pass returns: the gradients times this factor, in the dtypes of what they belong to."""
        found = (self._hidden_NH, self._weight_VH, self._bias_V)
        if factor != 1.0:
            for gradient in found:
                if gradient is not None:
                    gradient.mul_(factor)
        like = self._of
        grads = (None if g is None or x is None else g.to(x.dtype) for g, x in zip(found, like, strict=True))
        return (*grads, *[None] * 6)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=_precision(x), device=x.device)


def _common_factor(grad_N: Tensor, slope_N: Tensor) -> float | None:
    """The number by which the derivatives that were expected are to be multiplied; None: those that came are others."""
    factor = (grad_N * slope_N).sum() / slope_N.square().sum()
    size_N = grad_N.abs()
    same = (grad_N - factor * slope_N).abs() <= _SAME * (size_N + _SAME * size_N.amax())
    told = torch.stack([factor, same.all().to(factor.dtype)]).tolist()
    return told[0] if told[1] and math.isfinite(told[0]) else None


def _precision(x: Tensor) -> torch.dtype:
    """The dtype of everything after the logits: fp32, or the model's own if that is finer."""
    return torch.promote_types(x.dtype, torch.float32)


def _factor(weight_VH: Float[Tensor, "V H"]) -> Float[Tensor, "V H"]:
    """The factor of hidden states: on a GPU the weight, since products of bf16 come out in fp32 there; elsewhere a copy in fp32."""
    return weight_VH if weight_VH.is_cuda else weight_VH.to(_precision(weight_VH))


def _used(
    weight_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, "V"] | None, logit_map: LogitMap
) -> tuple[Tensor, Tensor | None]:
    """The factor of hidden states and the addend, without the rows that make no logit."""
    size = logit_map.size
    return _factor(weight_VH[:size]), None if bias_V is None else bias_V[:size]


def _over(logits_CV: Float[Tensor, "C V"], temperature: float) -> Float[Tensor, "C V"]:
    return logits_CV if temperature == 1.0 else logits_CV / temperature


def _product(
    hidden_CH: Float[Tensor, "C H"], factor_VH: Float[Tensor, "V H"], bias_V: Float[Tensor, "V"] | None
) -> Float[Tensor, "C V"]:
    precision = _precision(hidden_CH)
    if factor_VH.dtype == precision:
        bias = None if bias_V is None else bias_V.to(precision)
        logits_CV = nn.functional.linear(hidden_CH.to(precision), factor_VH, bias)
    else:
        logits_CV = torch.mm(hidden_CH, factor_VH.t(), out_dtype=precision)
        if bias_V is not None:
            logits_CV += bias_V
    return logits_CV


def _grad_logits(
    logits_CV: Float[Tensor, "C V"],
    targets_C: Int[Tensor, "C"],
    lse_C: Float[Tensor, "C"],
    entropy_C: Float[Tensor, "C"],
    grad_logp_C: Float[Tensor, "C"] | None,
    grad_entropy_C: Float[Tensor, "C"] | None,
) -> Float[Tensor, "C V"]:
    """The gradient d logp / d l_j = [j = target] - p_j and d H / d l_j = -p_j (log p_j + H). Overwrites `logits_CV`."""
    logp_CV = logits_CV.sub_(lse_C[:, None])
    if grad_entropy_C is None:
        grad_C = torch.zeros_like(lse_C) if grad_logp_C is None else grad_logp_C
        return _through_softmax(logp_CV.exp_(), targets_C, grad_C)
    probs_CV = logp_CV.exp()
    slope_CV = logp_CV.add_(entropy_C[:, None]).mul_(grad_entropy_C[:, None])
    if grad_logp_C is not None:
        slope_CV.add_(grad_logp_C[:, None])
    grad_CV = slope_CV.mul_(probs_CV).neg_()
    if grad_logp_C is not None:
        grad_CV.scatter_add_(1, targets_C[:, None], grad_logp_C[:, None])
    return grad_CV


def _through_softmax(
    probs_CV: Float[Tensor, "C V"], targets_C: Int[Tensor, "C"], grad_logp_C: Float[Tensor, "C"]
) -> Float[Tensor, "C V"]:
    """The gradient by the logits of one by the log-probabilities alone. Overwrites `probs_CV`."""
    return probs_CV.mul_(-grad_logp_C[:, None]).scatter_add_(1, targets_C[:, None], grad_logp_C[:, None])


def chunked_logprobs(
    hidden_NH: Float[Tensor, "N H"],
    weight_VH: Float[Tensor, "V H"],
    bias_V: Float[Tensor, "V"] | None,
    targets_N: Int[Tensor, "N"],
    *,
    temperature: float,
    chunk: int,
    sets: TokenSets | None = None,
    logit_map: LogitMap = PLAIN,
    slopes: Slopes | None = None,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """The log-probability of each target, and the entropy of each distribution.

    Logits are fp32 from the products on, and so is all that follows (float64 for a model in float64). In bf16 a logit of 16 to 32
    is off by up to 0.06: MiniMax-M1 (2506.13585, section 3.2) and ScaleRL (2510.13786) keep the head in fp32 for it.

    Args:
        hidden_NH: [N, H].
        weight_VH: [V, H], of the output layer.
        bias_V: [V] or None.
        targets_N: [N] token ids.
        temperature: the divisor of the logits.
        chunk: the number of rows of logits that exist at once.
        sets: the tokens that each distribution is renormalised over; computed here unless an earlier pass, with chunks of the same
            size, has computed them. None: all.
        logit_map: what the model does to the product, before the temperature.
        slopes: what the loss says of each chunk's log-probabilities, which spares the backward pass the logits. A model that caps
            its logits has no use for it.

    Returns:
        log-probabilities [N] and entropies [N] in nats, both differentiable.
    """
    found: tuple[Tensor, Tensor] = _ChunkedLogprobs.apply(
        hidden_NH, weight_VH, bias_V, targets_N, temperature, chunk, sets, logit_map, slopes
    )
    return found


class LogprobHead(nn.Module):
    """The replacement of a model's `lm_head`, over the same Parameter (tied to the embedding or not).

    Called with targets it returns log-probabilities; without, the product as before, which the model's own forward goes on with.
    It is a module, so that ZeRO-3's hooks gather its weight for the forward and again for the backward pass.
    """

    def __init__(self, linear: nn.Linear, logit_map: LogitMap = PLAIN) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.logit_map = logit_map

    def forward(
        self,
        hidden: Tensor,
        targets_N: Int[Tensor, "N"] | None = None,
        temperature: float = 1.0,
        chunk: int = 1024,
        sets: TokenSets | None = None,
        slopes: Slopes | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets_N is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        return chunked_logprobs(
            hidden,
            self.weight,
            self.bias,
            targets_N,
            temperature=temperature,
            chunk=chunk,
            sets=sets,
            logit_map=self.logit_map,
            slopes=slopes,
        )
