"""Double-buffered weight loading: vLLM packs new weights in a shadow copy while sampling, where there is memory for it, and swaps
while paused.

vLLM can only reload the model that it samples with, and its linear layers on CPUs keep no weights, only packed ones: loading takes
as long as sampling has to stand still. So a shadow is loaded in its place: the same modules, that share with the model whatever is
not a weight (caches, configs, tables of the rotary embedding), and have parameters of their own.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

Batches = Iterable[list[tuple[str, Tensor]]]
"""Weights under their Hugging Face names, in batches."""


class Loader(Protocol):
    """How arriving weights are loaded and swapped in."""

    def load(self, batches: Batches) -> None:
        """Load all weights while the model samples. After an error the model is unchanged, and this loader of no further use."""
        ...

    def swap(self) -> None:
        """Swap what was loaded last into the model, which is not sampling."""
        ...


class WhenPaused:
    """The loader for a device that has no room for the model twice."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self._model = model
        self._model_config = model_config
        self._held: list[list[tuple[str, Tensor]]] = []

    def load(self, batches: Batches) -> None:
        self._held = list(batches)

    def swap(self) -> None:
        _load(self._model, self._model_config, self._held)
        self._held = []


class Shadow:
    """A second copy of the weights: the new ones, and after `swap` the old ones, whose memory the next ones reuse."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        # The garbage of an earlier shadow: vLLM's loaders keep modules in reference cycles.
        gc.collect()
        self._model_config = model_config
        self._twins: dict[nn.Module, nn.Module] = {}
        self._copies: dict[int, Tensor] = {}
        self._root = self._twin(model)
        self._made: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = []
        """The attributes of a module and of its twin, and the names of those that loading creates; the same every time."""

    def load(self, batches: Batches) -> None:
        # Not later: it would hold what is no longer needed while more is packed.
        before = {} if self._made else {twin: dict(vars(twin)) for twin in self._twins.values()}
        for module, twin in self._twins.items():
            LAYERWISE_INFO[twin] = _layerwise_info(module)
        try:
            _load(self._root, self._model_config, batches)
        finally:
            for twin in self._twins.values():
                LAYERWISE_INFO.pop(twin, None)
        self._made = self._made or [
            (vars(module), vars(twin), ["_parameters", "_buffers", *_changed(before[twin], vars(twin))])
            for module, twin in self._twins.items()
        ]

    def swap(self) -> None:
        for module, twin, names in self._made:
            for name in names:
                module[name], twin[name] = twin[name], module.get(name)

    def _twin(self, module: nn.Module) -> nn.Module:
        """The twin of a module and of those in it, made without its constructor, which would register it with vLLM."""
        if module in self._twins:
            return self._twins[module]
        twin = self._twins[module] = object.__new__(type(module))
        parameters = {name: None if p is None else self._copy(p) for name, p in module._parameters.items()}
        shared = module._non_persistent_buffers_set
        vars(twin).update(
            vars(module),
            _modules={name: None if m is None else self._twin(m) for name, m in module._modules.items()},
            _parameters=parameters,
            _buffers={name: b if b is None or name in shared else self._copy(b) for name, b in module._buffers.items()},
            _non_persistent_buffers_set=set(shared),
        )
        return twin

    def _copy(self, tensor: Tensor) -> Tensor:
        """One copy for each tensor, so that tied weights stay tied. Values are copied too: a checkpoint may lack some of them."""
        if id(tensor) not in self._copies:
            copy = self._copies[id(tensor)] = tensor.data.clone()
            copy.__class__ = tensor.__class__
            vars(copy).update(vars(tensor))
        return self._copies[id(tensor)]


def _changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [name for name, value in after.items() if name not in before or before[name] is not value]


def _layerwise_info(module: nn.Module) -> LayerReloadingInfo:
    """What vLLM recorded of a module before it packed it, for its twin: fresh tensors, since a reload modifies them."""
    info = get_layerwise_info(module)
    parameters, buffers = (
        {name: to_meta_tensor(t) for name, t in tensors.items()} for tensors in info.restore_metadata
    )
    return LayerReloadingInfo(restore_metadata=(parameters, buffers), restore_device=info.restore_device)


def _load(model: nn.Module, model_config: Any, batches: Batches) -> None:
    initialize_layerwise_reload(model)
    for weights in batches:
        model.load_weights(weights)  # type: ignore[operator]
    finalize_layerwise_reload(model, model_config)
    # The warnings about layers without weights of their own (rotary tables, tied heads) are the same with every sync.
    logging.getLogger(finalize_layerwise_reload.__module__).setLevel(logging.ERROR)
    _repack_tied_heads(model)


def _repack_tied_heads(model: nn.Module) -> None:
    """Refresh the packed copy that vLLM's CPU lm_head keeps of a tied embedding.

    With tied embeddings lm_head shares `embed_tokens.weight` but multiplies with a packed copy of its own (`cpu_linear`),
    which the layerwise reload of vLLM 0.32 leaves unchanged: outputs would silently go on using the old head.
    """
    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in embeddings:
        tied = any(head.weight is other.weight for other in embeddings if other is not head)
        if isinstance(head, ParallelLMHead) and tied and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)
