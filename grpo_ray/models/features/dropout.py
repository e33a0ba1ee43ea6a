"""Dropout and other noise of training (router jitter, dropped layers), which is switched off here unless `learner.dropout` is true:
with it, old and current log-probabilities of the same weights would differ.

Modules are noisy only while they are in training mode, so they are kept out of it. Layers that recompute their activations have
to be in it; of these the rates are 0 too, by their names in the config and in the layer.
"""

from __future__ import annotations

import re
from types import MethodType
from typing import Any

from torch import nn

_RATE = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate")
"""The option names of dropout in Transformers' models: attention_dropout, resid_pdrop, hidden_dropout_prob, layerdrop, ..."""


def without_dropout(config: Any) -> Any:
    """The same Transformers config with every dropout rate 0, nested configs included."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and _RATE.search(name):
            setattr(config, name, 0.0)
    return config


def without_noise(hf: nn.Module) -> None:
    """Make `train()` of a Transformers model leave its modules in evaluation mode, but for layers that recompute their activations,
    whose rates become 0. Its outputs are those of `eval()` then, and gradients flow as ever."""
    # A critic has the body alone.
    models: list[Any] = [hf.base_model, hf]
    for model in models:
        model.train = MethodType(_train, model)
    hf.train(hf.training)


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    type(model).train(model, mode)
    for module in model.modules():
        module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            _set_rates_to_0(module)
    return model


def _set_rates_to_0(module: nn.Module) -> None:
    for name, value in list(vars(module).items()):
        if isinstance(value, float) and _RATE.search(name):
            setattr(module, name, 0.0)
