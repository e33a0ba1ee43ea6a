"""A learner's states out of the device's memory and back, so that a sampler can have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def offload(engine: Any, device: torch.device, *, keep_weights: bool) -> None:
    """Move the engine's states to the host's memory, the weights with them unless they are kept. What is moved already stays
    where it is."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

    if has_zero(engine):
        kinds = [State.hp_params, State.lp_grads, State.optim_states, *([] if keep_weights else [State.lp_params])]
        engine.offload_states(include=kinds, pin_memory=device.type == "cuda")
    else:
        _move(_optimizer_tensors(engine), torch.device("cpu"))
    if not keep_weights:
        _move(_tensors(engine.module), torch.device("cpu"))
    _release(device)


def reload(engine: Any, device: torch.device) -> None:
    """Move all of them back."""
    if has_zero(engine):
        engine.reload_states()
    else:
        _move(_optimizer_tensors(engine), device)
    _move(_tensors(engine.module), device)


def move_model(model: nn.Module, device: torch.device) -> None:
    """One without an optimizer: the reference."""
    _move(_tensors(model), device)
    _release(device)


def has_zero(engine: Any) -> bool:
    return int(engine.zero_optimization_stage()) > 0


def _optimizer_tensors(engine: Any) -> Iterator[Tensor]:
    for state in engine.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Those that are whole: parts of ZeRO-3 are its own to move."""
    yield from (p for p in module.parameters() if not hasattr(p, "ds_id"))
    yield from module.buffers()


def _move(tensors: Iterator[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        if tensor.device != device:
            tensor.data = tensor.data.to(device)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
