"""Rotary positions that depend on the length of a sequence (longrope, dynamic NTK), for each sequence of a micro-batch by itself.

Transformers chooses them for a whole micro-batch by its longest position, and dynamic NTK goes on with those of the longest one so
far: a sample's log-probabilities would depend on what else is computed.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_BY_LENGTH = ("dynamic", "longrope")


def has_ropes_by_length(model: nn.Module) -> bool:
    """Whether positions of a Transformers model depend on the length of a sequence."""
    return any(_kinds(module) for module in model.modules())


def use_ropes_of_each_sequence(model: nn.Module) -> None:
    """Make a Transformers model compute such positions for each sequence of a row by itself, as of a sample with one more token:
    the last one predicts nothing, and is left out. A sequence begins where the position is 0."""
    for module in model.modules():
        if _kinds(module):
            module.forward = MethodType(_each_by_itself, module)


def _kinds(module: Any) -> set[str]:
    kind = vars(module).get("rope_type")
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return {k for k in kinds if isinstance(k, str) and any(by in k for by in _BY_LENGTH)}


def _each_by_itself(
    module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The cosines and sines [B, N, D] of positions [B, N]."""
    if layer_type is not None:
        kwargs["layer_type"] = layer_type
    found: list[tuple[Tensor, Tensor]] = []
    for positions in _sequences(position_ids):
        _forget(module, layer_type, x.device)
        longer = torch.cat([positions, positions[-1:] + 1])[None]
        cos, sin = type(module).forward(module, x, longer, **kwargs)
        found.append((cos[0, :-1], sin[0, :-1]))
    of_all = (torch.cat(parts).unflatten(0, position_ids.shape) for parts in zip(*found, strict=True))
    return next(of_all), next(of_all)


def _sequences(position_ids: Tensor) -> tuple[Tensor, ...]:
    rows = position_ids.flatten()
    starts = [k for k in (rows == 0).nonzero()[:, 0].tolist() if k > 0]
    return rows.tensor_split(starts)


def _forget(module: Any, layer_type: str | None, device: torch.device) -> None:
    """Make the module as it was before it saw a sequence."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(device))
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
