"""Dropout that a checkpoint's config.json brings with it, switched off."""

from __future__ import annotations

import re
from typing import Any

_RATE = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate")
"""In the names that Transformers' models give to it: attention_dropout, resid_pdrop, hidden_dropout_prob, layerdrop, ..."""


def without_dropout(config: Any) -> Any:
    """The same config of Transformers, with every rate of dropout 0, in the configs that it holds too.

    With dropout, old and current log-probabilities of the same weights would differ.
    """
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and _RATE.search(name):
            setattr(config, name, 0.0)
    return config
