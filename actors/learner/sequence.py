"""Sequence parallelism: learner ranks side by side that share their micro-batches (Ulysses, on DeepSpeed's all-to-all).

Before attention, slices of all heads become all tokens of a part of the heads; after it, the other way round. DeepSpeed
does not know about it: to its engines all ranks are data-parallel, and their gradients are added up over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo_ray.batch.sequence import Alone, SequenceRanks, check_model

_PER_HEAD = ("s_aux", "position_bias")


def join(size: int, timeout: timedelta) -> SequenceRanks:
    """Ranks 0 .. size - 1 share their micro-batches, the next `size` do, and so on; all ranks together.

    Args:
        size: divides the number of ranks.
        timeout: the limit of each collective; torch does not pass on that of the whole world.
    """
    if size == 1:
        return Alone()
    groups = [dist.new_group(range(a, a + size), timeout=timeout) for a in range(0, dist.get_world_size(), size)]
    return SequenceGroup(groups[dist.get_rank() // size])


class SequenceGroup:
    """Implements `grpo_ray.batch.sequence.SequenceRanks`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._split: set[str] = set()

    def split_heads(self, hf: nn.Module) -> None:
        """Split the heads of every model of this process that has the same attention implementation.

        Raises:
            ConfigError: see `grpo_ray.batch.sequence.check_model`.
        """
        from transformers import AttentionInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        check_model(hf, self.size)
        config: Any = hf.config
        name = config._attn_implementation
        if name not in self._split:
            AttentionInterface.register(name, HeadAttention(ALL_ATTENTION_FUNCTIONS[name], self))
            self._split.add(name)

    def gather(self, counts: Sequence[int], *values_c: Tensor) -> tuple[Tensor, ...]:
        """See `SequenceRanks.gather`."""
        gathered: tuple[Tensor, ...] = _Gather.apply(self, counts, *values_c)
        return gathered


class HeadAttention:
    """One of Transformers' attention functions, over all tokens and a part of the heads."""

    def __init__(self, attention: Any, ranks: SequenceGroup) -> None:
        from deepspeed.sequence.layer import DistributedAttention

        self._attention = attention
        self._size = ranks.size
        self._exchange = DistributedAttention(self._local, ranks.group, scatter_idx=2, gather_idx=1)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Call the function itself, on a slice.

        Args:
            query: [1, heads, n, D].
            key: [1, key heads, n, D].
            value: [1, key heads, n, D].

        Returns:
            [1, n, heads, D], and no weights.

        Raises:
            ValueError: the attention has parameters of its own for each head.
        """
        odd = [name for name in _PER_HEAD if kwargs.get(name) is not None]
        if odd:
            raise ValueError(
                f"{type(module).__name__} uses {', '.join(odd)}, which is not split by head; use learner.sequence_parallel_size 1"
            )
        # Key heads that the ranks can't share evenly are repeated until they can; each query head keeps its own.
        repeats = self._size // math.gcd(self._size, key.shape[1])
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return self._exchange(q, k, v, 0, module=module, attention_mask=attention_mask, **kwargs), None

    def _local(self, query: Tensor, key: Tensor, value: Tensor, *, module: nn.Module, **kwargs: Any) -> Tensor:
        """The attention of this rank's slice, [1, N, heads / size, D] in and out."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out: Tensor = self._attention(module, q, k, v, **kwargs)[0]
        return out


class _Gather(torch.autograd.Function):
    """The gather, whose backward pass needs no messages: every rank has the gradient of the whole already, from the same loss."""

    @staticmethod
    def forward(ctx: Any, ranks: SequenceGroup, counts: Sequence[int], *values_c: Tensor) -> tuple[Tensor, ...]:
        start = sum(counts[: ranks.rank])
        ctx.own = slice(start, start + counts[ranks.rank])
        ctx.set_materialize_grads(False)
        sent = values_c[0].new_zeros(len(values_c), max(counts))
        for row, values in zip(sent, values_c, strict=True):
            row[: len(values)] = values
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent, group=ranks.group)
        return tuple(
            torch.cat([rows[i, :count] for rows, count in zip(received, counts, strict=True)])
            for i in range(len(values_c))
        )

    @staticmethod
    def backward(ctx: Any, *grads_C: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *(None if grad_C is None else grad_C[ctx.own] for grad_C in grads_C)
