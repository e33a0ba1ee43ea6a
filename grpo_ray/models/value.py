"""PPO's critic: a language model's body with one output.

Suffixes: C completion tokens of one micro-batch, S sequences, T tokens of the longest.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from grpo_ray.batch.pack import PackedBatch
from grpo_ray.batch.sequence import Alone, SequenceRanks
from grpo_ray.models.plain import plain_states
from grpo_ray.models.policy import own_slice, target_states


class ValueModel(nn.Module):
    """The critic: V of the text before each completion token. The head starts at zero, so every value does."""

    def __init__(self, hf: nn.Module, ranks: SequenceRanks | None = None, *, plain: bool = False) -> None:
        super().__init__()
        self.ranks = ranks or Alone()
        self.plain = plain
        config: Any = hf.config
        self.body = hf.base_model
        self.attention = config._attn_implementation
        self.head = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: PackedBatch) -> Tensor:
        """The values [C], fp32."""
        device = self.head.weight.device
        if self.plain:
            return self._values(plain_states(self.body, batch, device))
        own = own_slice(batch, self.ranks, device)
        hidden_cH = target_states(self.body, own, self.attention, device)
        (values_C,) = self.ranks.gather(own.counts, self._values(hidden_cH))
        return values_C

    def _values(self, hidden_H: Tensor) -> Tensor:
        values: Tensor = self.head(hidden_H.to(self.head.weight.dtype))[:, 0].float()
        return values
