"""What a model does between its body and its logits besides the product with the output layer, measured by its own forward.

    logits = cap * tanh(scale * (W h + b) / cap),    h = hidden_scale * layers(the body's hidden state)

The body, the layers after it and the output layer are replaced for one call by functions of known values, so no weight takes part:
the same is found of a model without memory, and of weights that ZeRO-3 has sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from grpo_ray.models.linear import FasterLinear

_SMALL, _LARGE = 2.0**-20, 2.0**40
"""The logits at which a cap is not felt, and at which nothing else is; powers of two pass through any dtype unrounded."""
_FEATURES = ("cap", "scal", "mult", "mup")
_NUM_TOKENS = 3


@dataclass(frozen=True)
class LogitMap:
    """The numbers and layers of one model."""

    scale: float = 1.0
    cap: float | None = None
    size: int | None = None
    """The number of logits, if the output layer has more rows than that."""
    hidden_scale: float = 1.0
    layers: tuple[str, ...] = ()
    """The names of the model's modules between body and output layer."""

    def before(self, hf: nn.Module, hidden_NH: Tensor) -> Tensor:
        """The output layer's input, from the hidden states of the body."""
        for name in self.layers:
            hidden_NH = hf.get_submodule(name)(hidden_NH)
        return hidden_NH if self.hidden_scale == 1.0 else hidden_NH * self.hidden_scale

    def apply_(self, product_CV: Tensor) -> Tensor:
        """The logits, of the output layer's product, which they overwrite."""
        if self.scale != 1.0:
            product_CV.mul_(self.scale)
        return product_CV if self.cap is None else product_CV.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits_CV: Tensor) -> Tensor | None:
        """The derivative of each logit by `scale` times its product; None: it is 1."""
        return None if self.cap is None else (logits_CV / self.cap).square_().neg_().add_(1.0)


PLAIN = LogitMap()


def logit_map(hf: nn.Module, *, whole: bool = False) -> LogitMap:
    """Measure what a Transformers model does to its hidden states and logits.

    Args:
        whole: whether its own forward is called up to the output layer, so that it needs no body that can be called alone.

    Raises:
        ValueError: it is more than a `LogitMap` says, or the output layer is no plain linear layer.
    """
    model: Any = hf
    head, name = model.get_output_embeddings(), type(hf).__name__
    if model.base_model is hf and not whole:
        raise ValueError(f"{name} has no body that can be called without its output layer: not supported")
    if type(head) not in (nn.Linear, FasterLinear):
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"{name} has no plain linear output layer (but {kind}): not supported")
    probe = _Probe(hf, head.out_features, whole=whole)
    try:
        logits = probe.logits()
    # A stranger's forward may fail in any way on a body that is not one.
    except Exception as e:
        raise ValueError(f"{name} does more than call its output layer on its body's hidden states ({e})") from None
    found = probe.found(logits)
    if found is None:
        raise ValueError(
            f"{name} changes its logits in a way that the learner's head lacks{_named(model)}: not supported"
        )
    return found


@dataclass
class _Output(BaseModelOutputWithPast):
    """What a body returns. All that it lacks is None."""

    def __getattr__(self, name: str) -> None:
        return None


class _Probe:
    """One call of a model's forward, with known hidden states and products."""

    def __init__(self, hf: Any, num_products: int, *, whole: bool) -> None:
        self.hf = hf
        self.whole = whole
        """Whether a child that gets token ids is a body, too."""
        self.hidden = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)[None, :, None].expand(1, _NUM_TOKENS, 4)
        spread = torch.linspace(-64, 64, num_products, dtype=torch.float64)
        self.products = torch.stack([torch.full_like(spread, _SMALL), torch.full_like(spread, _LARGE), spread])[None]
        self.layers: list[str] = []
        self.inputs: list[Tensor] = []
        self.late: list[str] = []

    @torch.no_grad()
    def logits(self) -> Tensor:
        hf = self.hf
        head, body = hf.get_output_embeddings(), hf.base_model
        replaced: dict[nn.Module, Callable[..., Any]] = {head: self._head}
        # Some classes call the decoder inside their body.
        for module in (body, hf.get_decoder() if hasattr(hf, "get_decoder") else body):
            if isinstance(module, nn.Module) and module not in (hf, head):
                replaced[module] = lambda *_, **__: _Output(last_hidden_state=self.hidden)
        for name, module in hf.named_children():
            if module not in replaced:
                replaced[module] = self._layer(name)
        with _replaced(replaced):
            found: Tensor = hf(input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.long), use_cache=False).logits
        return found

    def _head(self, hidden: Tensor) -> Tensor:
        self.inputs.append(hidden)
        return self.products

    def _layer(self, name: str) -> Callable[..., Any]:
        def forward(hidden: Any = None, *_: Any, **given: Any) -> Any:
            if hidden is None and self.whole and given.get("input_ids") is not None:
                return _Output(last_hidden_state=self.hidden)
            (self.late if self.inputs else self.layers).append(name)
            return hidden

        return forward

    def found(self, logits: Tensor) -> LogitMap | None:
        """The map that gives these logits of the products; None: there is no such."""
        hidden = self.inputs[0].double() if len(self.inputs) == 1 else None
        if hidden is None or self.late or hidden.shape != self.hidden.shape or logits.dim() != 3:
            return None
        size, hidden_scale = logits.shape[-1], _tidy(hidden[0, 0, 0])
        scale, large = _tidy(logits[0, 0, 0] / _SMALL), _tidy(logits[0, 1, 0])
        capped = not _close(large, scale * _LARGE)
        cut = size if size < self.products.shape[-1] else None
        found = LogitMap(scale, large if capped else None, cut, hidden_scale, tuple(self.layers))
        if not all(0 < abs(x) < _LARGE for x in (scale, hidden_scale, large if capped else 1.0)):
            return None
        want = found.apply_(self.products[..., :size].clone())
        as_said = torch.allclose(logits.double(), want, rtol=1e-5, atol=1e-9)
        return found if as_said and torch.allclose(hidden, self.hidden * hidden_scale) else None


def _tidy(x: Tensor) -> float:
    """The value without the last digits, which rounding made."""
    return float(f"{float(x):.12g}")


def _close(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-5 * abs(y)


@contextmanager
def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which these modules compute something else."""
    kept = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, own in kept.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def _named(model: Any) -> str:
    """The options of its config that it may do it by, in words."""
    options = {**vars(model.config), **vars(model.config.get_text_config())}
    odd = [
        n for n, v in options.items() if "logit" in n and any(f in n for f in _FEATURES) and isinstance(v, int | float)
    ]
    return f" ({', '.join(odd)} in its config)" if odd else ""
