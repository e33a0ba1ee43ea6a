"""A model's decoder layers, compiled by torch.compile one by one: all of them are the same code, so it is compiled once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from grpo_ray.errors import ConfigError


def compile_layers(hf: nn.Module, backend: str = "inductor") -> None:
    """Compile the decoder layers of a Transformers model, in place: its parameters keep their names. Attention is not compiled,
    for the lengths of sequences would be part of its code.

    Args:
        backend: what makes code of the traced operations.

    Raises:
        ConfigError: the model does not say which of its modules are layers.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model: Any = hf
    kinds = set(model._no_split_modules or ())
    layers = [module for module in hf.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(
            f"model.compile: {type(hf).__name__} does not say which of its modules are layers; leave it out"
        )
    name = model.config._attn_implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[name] = torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name])
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
