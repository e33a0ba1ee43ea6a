"""Mixtures of experts: the experts that tokens take, the load-balancing loss of their routers, and routes that are kept.

    router(hidden [n, H]) -> logits [n, E], scores [n, k], experts [n, k]

A router is wrapped, so that a layer which computes its activations again does again what it did: the loss is not a term of the
loss that is returned, but a gradient that enters at the router's logits (as Megatron's MoEAuxLossAutoScaler), and the experts
that were kept are taken again.

Suffixes: n rows that are computed, K tokens of all sequences (those of a shared prompt once for each), S sequences, E experts,
k experts of a token, L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grpo_ray.batch.device import on_device
from grpo_ray.batch.pack import PackedBatch
from grpo_ray.batch.sequence import Slice
from grpo_ray.models.plain import row_length

_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts of a layer."""


@dataclass(frozen=True)
class Router:
    """A module that chooses the experts of each token."""

    module: nn.Module
    layer: int
    """The number of its layer in the model."""
    logits: int
    """The place of its logits in what it returns."""
    num_experts: int

    def is_known(self, out: Any) -> bool:
        """Whether it returned logits, scores and experts."""
        if not isinstance(out, tuple) or len(out) != 3 or not all(isinstance(x, Tensor) and x.dim() == 2 for x in out):
            return False
        floats = [x.is_floating_point() for x in out]
        return bool(sum(floats) == 2 and floats[self.logits] and out[self.logits].shape[-1] == self.num_experts)

    def roles(self, out: Any) -> tuple[int, int]:
        """The places of scores and experts in what it returned.

        Raises:
            ValueError: it returned something else.
        """
        if not self.is_known(out):
            raise ValueError(f"{type(self.module).__name__} does not return logits, scores and experts")
        experts = next(i for i in range(3) if not out[i].is_floating_point())
        return 3 - experts - self.logits, experts


def find_routers(hf: nn.Module) -> list[Router]:
    """The routers of a Transformers model, by what it says it can record; none for a model without experts, or whose routers are
    no modules of their own."""
    model: Any = hf
    text = model.config.get_text_config()
    num_experts = next((n for name in _NUM_EXPERTS if (n := getattr(text, name, None))), 0)
    recorders = {
        recorder.target_class: recorder.index
        for module in hf.modules()
        for recorder in _recorders(module)
        if recorder.target_class is not nn.Linear
    }
    found = [
        (name, module, index)
        for name, module in hf.named_modules()
        for kind, index in recorders.items()
        if isinstance(module, kind)
    ]
    return [
        Router(module, _layer(name, number), index, int(num_experts))
        for number, (name, module, index) in enumerate(found)
    ]


def _recorders(module: Any) -> list[Any]:
    from transformers.utils.output_capturing import OutputRecorder

    specs = getattr(type(module), "_can_record_outputs", None)
    of_routers = specs.get("router_logits", []) if isinstance(specs, dict) else []
    listed = of_routers if isinstance(of_routers, list) else [of_routers]
    return [spec for spec in listed if isinstance(spec, OutputRecorder) and spec.target_class is not None]


def _layer(name: str, number: int) -> int:
    found = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else number


class Kept(TorchFunctionMode):
    """A mode in which the choice of the k best of E is these experts: their scores are those that the router gives them."""

    def __init__(self, experts_nk: Tensor, num_experts: int) -> None:
        super().__init__()
        self.experts_nk = experts_nk
        self.num_experts = num_experts
        self.num_choices = 0

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk) or not self._is_choice(*args, **kwargs):
            return func(*args, **kwargs)
        self.num_choices += 1
        values: Tensor = args[0] if args else kwargs["input"]
        return torch.return_types.topk((values.gather(-1, self.experts_nk), self.experts_nk))

    def _is_choice(self, input: Tensor, k: int, *_args: Any, **_kwargs: Any) -> bool:  # noqa: A002 - torch's name
        return tuple(input.shape) == (len(self.experts_nk), self.num_experts) and k == self.experts_nk.shape[-1]


@dataclass
class RoutingPass:
    """One micro-batch on its way through the routers: what they need of it, and what they found."""

    rows_n: Tensor
    """The rows that hold tokens."""
    places_K: Tensor
    """[K] the row of each token."""
    segments_K: Tensor
    """[K] the sequence of each token, ascending."""
    lengths_S: Tensor
    """[S] the number of tokens of each sequence."""
    routes_nLk: Tensor | None = None
    """The experts to take, by layer; None: the routers' own choice."""
    weights_S: Tensor | None = None
    """The weight of each sequence's load-balancing loss; None: there is no such loss."""
    scale: float = 1.0
    """By what the gradient of that loss is multiplied."""
    recording: bool = True
    """Whether this is the pass itself, and not one that computes activations again."""
    load: dict[int, Tensor] = field(default_factory=dict)
    """Layer -> [E] how many of the rows that hold tokens take each expert."""
    loss: Tensor | None = None
    """The load-balancing loss of the sequences, weighted."""
    pull_nE: Tensor | None = None
    """The gradient of that loss at the probability of each expert."""
    _counts_SE: Tensor | None = None
    _probs_SE: Tensor | None = None
    _num_rows: int = 0

    def record(self, layer: int, logits_nE: Tensor, experts_nk: Tensor) -> None:
        num_experts, num = logits_nE.shape[-1], len(self.lengths_S)
        self.load[layer] = _counted(experts_nk[self.rows_n], num_experts)
        if self.weights_S is None:
            return
        if self._counts_SE is None or self._probs_SE is None:
            self._counts_SE, self._probs_SE = logits_nE.new_zeros(2, num, num_experts, dtype=torch.float32)
            self._num_rows = len(logits_nE)
        taken = self.segments_K[:, None] * num_experts + experts_nk[self.places_K]
        self._counts_SE += _counted(taken, num * num_experts).view(num, num_experts)
        probs_KE = logits_nE.float().softmax(-1)[self.places_K]
        # As in `Segments.sum`: the same bits every time.
        self._probs_SE += torch.segment_reduce(probs_KE, "sum", lengths=self.lengths_S, unsafe=True)

    def finish(self) -> None:
        """Compute the loss of each sequence, as Transformers' `load_balancing_loss_func`: E x the sum over experts of the part of
        its tokens that take one, times its mean probability; over all layers together."""
        self.recording = False
        if self.weights_S is None or self._counts_SE is None or self._probs_SE is None:
            return
        num_experts = self._counts_SE.shape[-1]
        rows_S1 = len(self.load) * self.lengths_S[:, None]
        taken_SE = self._counts_SE / rows_S1
        self.loss = (self.weights_S * num_experts * (taken_SE * self._probs_SE / rows_S1).sum(-1)).sum()
        pull_SE = self.weights_S[:, None] * self.scale * num_experts * taken_SE / rows_S1
        pull_nE = pull_SE.new_zeros(self._num_rows, num_experts)
        self.pull_nE = pull_nE.index_put_((self.places_K,), pull_SE[self.segments_K], accumulate=True)


def _counted(numbers: Tensor, size: int) -> Tensor:
    """[size] how often each number below `size` is there. Unlike bincount, this does not wait for a GPU."""
    found = numbers.flatten()
    return torch.zeros(size, device=found.device).index_add_(0, found, torch.ones(len(found), device=found.device))


class _Balanced(torch.autograd.Function):
    """Scores as they are, whose backward adds the gradient of the load-balancing loss to the logits'."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, logits_nE: Tensor, on_its_way: RoutingPass) -> Tensor:
        ctx.save_for_backward(logits_nE)
        ctx.on_its_way = on_its_way
        return scores.view_as(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (logits_nE,) = ctx.saved_tensors
        probs_nE, pull_nE = logits_nE.float().softmax(-1), ctx.on_its_way.pull_nE
        at_logits = probs_nE * (pull_nE - (pull_nE * probs_nE).sum(-1, keepdim=True))
        return grads[0], at_logits.to(logits_nE.dtype), None


class Routing:
    """The routers of a Transformers model, wrapped in place."""

    coef: float = 0.0
    """The coefficient of the load-balancing loss."""
    scale: float = 1.0
    """By what gradients are divided afterwards: the number of ranks over which they are averaged."""

    def __init__(self, routers: list[Router]) -> None:
        self.routers = routers
        self.weigh: Callable[[PackedBatch], NDArray[np.float32]] = even_weights
        self.last: RoutingPass | None = None
        """The pass of the newest micro-batch that is trained; its backward still needs it."""
        for router in routers:
            router.module.forward = partial(self._route, router, router.module.forward)

    @contextmanager
    def of(self, batch: PackedBatch, device: torch.device, own: Slice | None) -> Iterator[None]:
        tokens_K, segments_K, positions_K = tokens_of(batch)
        if own is None:
            length = row_length(batch, device)
            places_K, num_rows = segments_K * length + positions_K, len(batch.sequences) * length
        else:
            places_K, num_rows = tokens_K, len(own.input_ids)
        trained, routes = torch.is_grad_enabled() and not batch.is_dummy, None
        if batch.routes is not None:
            routes_nLk = np.zeros((num_rows, *batch.routes.shape[1:]), np.int16)
            routes_nLk[places_K] = batch.routes[tokens_K]
            routes = on_device(routes_nLk, device)
        weights = on_device(self.coef * self.weigh(batch), device) if self.coef and trained else None
        now = RoutingPass(
            on_device(np.unique(places_K), device),
            on_device(places_K, device),
            on_device(segments_K, device),
            on_device(np.bincount(segments_K), device),
            routes,
            weights,
            self.scale,
            recording=trained,
        )
        self.last = now
        try:
            yield
        finally:
            now.finish()
            if not trained:
                self.last = None

    def _route(self, router: Router, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        now = self.last
        if now is None:
            return forward(*args, **kwargs)
        kept = None
        if now.routes_nLk is not None:
            kept = Kept(now.routes_nLk[:, router.layer].long(), router.num_experts)
        with kept or nullcontext():
            out = forward(*args, **kwargs)
        if kept is not None and kept.num_choices != 1:
            raise ValueError(f"{type(router.module).__name__} does not choose its experts as a top-k of all of them")
        if kept is None and now.weights_S is None and not router.is_known(out):
            return out
        scores, experts = router.roles(out)
        logits_nE = out[router.logits]
        if now.recording:
            now.record(router.layer, logits_nE.detach(), out[experts])
        if now.weights_S is None:
            return out
        balanced = _Balanced.apply(out[scores], logits_nE, now)
        return tuple(balanced if i == scores else x for i, x in enumerate(out))


class RoutingSums:
    """The load of experts and the load-balancing loss of one update on one rank, summed."""

    def __init__(self, routing: Routing | None, device: torch.device) -> None:
        self._routing = routing
        self._layers = [] if routing is None else sorted({r.layer for r in routing.routers})
        self._num_experts = 0 if routing is None else max(r.num_experts for r in routing.routers)
        self._loss = torch.zeros(1, dtype=torch.float64, device=device)
        self._load_LE = torch.zeros(len(self._layers), self._num_experts, dtype=torch.float64, device=device)

    def add(self) -> None:
        """Add what the newest micro-batch found."""
        found = None if self._routing is None else self._routing.last
        if found is None:
            return
        for place, layer in enumerate(self._layers):
            self._load_LE[place] += found.load.get(layer, 0)
        if found.loss is not None:
            self._loss += found.loss

    def scale(self, factor: float) -> None:
        """Multiply the loss, as the gradient is."""
        self._loss *= factor

    @property
    def totals(self) -> Tensor:
        """All sums, to be added over ranks."""
        return torch.cat([self._loss, self._load_LE.flatten()])

    def metrics(self, totals: Tensor, num_steps: int) -> dict[str, float]:
        """Metrics from the totals over all ranks and the `num_steps` optimizer steps."""
        loss, load_LE = float(totals[0]), totals[1:].view_as(self._load_LE)
        load_LE = load_LE[load_LE.any(-1)]
        if not len(load_LE):
            return {}
        parts_LE = load_LE / load_LE.sum(-1, keepdim=True)
        entropy_L = torch.special.entr(parts_LE).sum(-1) / math.log(max(self._num_experts, 2))
        out = {
            "router/load_max": float(parts_LE.max(-1).values.mean()) * self._num_experts,
            "router/load_entropy": float(entropy_L.mean()),
        }
        assert self._routing is not None
        return out | ({"loss/router": loss / num_steps} if self._routing.coef else {})


def passing(
    routing: Routing | None, batch: PackedBatch, device: torch.device, own: Slice | None = None
) -> AbstractContextManager[None]:
    """A context in which a model with these routers computes a micro-batch: `own`, or on the plain path a row for each sequence."""
    return nullcontext() if routing is None else routing.of(batch, device, own)


def tokens_of(batch: PackedBatch) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """[K] the place in `input_ids` of each token of each sequence, its sequence, and its position in that; no padding."""
    last = np.searchsorted(batch.segments, np.arange(len(batch.sequences)), side="right") - 1
    lengths = batch.position_ids[batch.target_rows[last]] + 1
    tokens = [row[:length] for row, length in zip(batch.tokens_of_sequences, lengths, strict=True)]
    positions = [np.arange(length) for length in lengths]
    return np.concatenate(tokens), np.repeat(np.arange(len(lengths)), lengths), np.concatenate(positions)


def even_weights(batch: PackedBatch) -> NDArray[np.float32]:
    """[S] the same for each sequence, 1 together."""
    return np.full(len(batch.sequences), 1 / len(batch.sequences), np.float32)
