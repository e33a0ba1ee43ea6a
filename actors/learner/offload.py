"""A learner's states moved out of the device's memory and back, so that a rollout engine can have it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


def offload(engine: Any, device: torch.device, *, keep_weights: bool) -> None:
    """Move the engine's states to the host's memory, the weights with them unless they are kept. What has moved already stays
    where it is."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

    stage = engine.zero_optimization_stage()
    if stage:
        kinds = [State.lp_grads]
        if stage < 3:
            kinds += [State.hp_params, State.optim_states]
        if not keep_weights:
            kinds.append(State.lp_params)
        engine.offload_states(include=kinds, pin_memory=device.type == "cuda")
        if not gc.get_freeze_count():
            # DeepSpeed collects garbage each time, a third of a second: freeze what has survived, so that it is not scanned again.
            gc.freeze()
    _move(_own(engine), HOST)
    if not keep_weights:
        _move(_whole(engine.module), HOST)
    _release(device)


def reload(engine: Any, device: torch.device) -> None:
    """Move all states back."""
    if engine.zero_optimization_stage():
        engine.reload_states()
    _move(_own(engine), device)
    _move(_whole(engine.module), device)


def move_model(model: nn.Module, device: torch.device) -> None:
    """Move a model without an optimizer: the reference."""
    _move(_whole(model), device)
    _release(device)


def _own(engine: Any) -> Iterator[Tensor]:
    """The states that DeepSpeed does not move: any optimizer's without ZeRO; with ZeRO-3, where it moves those of its own Adam
    alone, the states and the fp32 weights."""
    stage = engine.zero_optimization_stage()
    if stage not in (0, 3):
        return
    if stage == 3:
        yield from engine.optimizer.fp32_partitioned_groups_flat
    optimizer = engine.optimizer.optimizer if stage == 3 else engine.optimizer
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor) and value.ndim > 0)


def _whole(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers that ZeRO-3 has not partitioned; its own partitions are its to move."""
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
