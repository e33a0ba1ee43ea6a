"""Whole parameters, for a moment, of those that ZeRO-3 has partitioned over the learner ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn


def gathered(params: list[nn.Parameter], writer: int | None = None) -> AbstractContextManager[Any]:
    """Whole parameters inside, whatever ZeRO-3 has partitioned; all ranks together. `writer`: the rank whose changes all take
    over; None: nobody changes anything.
    """
    sharded = [p for p in params if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer)
    return whole
