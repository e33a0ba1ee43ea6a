"""Dropout in a checkpoint's config.json, which is switched off here."""

from __future__ import annotations

import re
from typing import Any

_RATE = re.compile(r"dropout|pdrop|layerdrop|drop_path|drop_rate")
"""The option names of dropout in Transformers' models: attention_dropout, resid_pdrop, hidden_dropout_prob, layerdrop, ..."""


def without_dropout(config: Any) -> Any:
    """The same Transformers config with every dropout rate 0, nested configs included.

    With dropout, old and current log-probabilities of the same weights would differ.
    """
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and _RATE.search(name):
            setattr(config, name, 0.0)
    return config
