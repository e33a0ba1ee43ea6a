"""A language model's body with one output: the score of a whole text, read at its last token.

It matches Transformers' `AutoModelForSequenceClassification` with one label, so an export is one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_ray.batch.pack import PackedBatch
from grpo_ray.batch.sequence import Alone, SequenceRanks
from grpo_ray.models.features.routing import Routing, passing
from grpo_ray.models.plain import plain_states
from grpo_ray.models.policy import own_slice, target_states


class RewardModel(nn.Module):
    """A model with the inputs of `PolicyModel`; in place of a log-probability it returns the value of the text before the token."""

    def __init__(
        self,
        hf: nn.Module,
        ranks: SequenceRanks | None = None,
        *,
        plain: bool = False,
        routing: Routing | None = None,
    ) -> None:
        super().__init__()
        self.hf = hf
        self.ranks = ranks or Alone()
        self.plain = plain
        self.routing = routing

    def forward(self, batch: PackedBatch, _temperature: float) -> tuple[Tensor, Tensor]:
        """The values [C], and zeros in place of a policy's entropies; fp32."""
        hf: Any = self.hf
        weight = hf.score.weight
        if self.plain:
            with passing(self.routing, batch, weight.device):
                hidden_CH = plain_states(hf.base_model, batch, weight.device)
            values_C = hf.score(hidden_CH.to(weight.dtype))[:, 0].float()
            return values_C, torch.zeros_like(values_C)
        own = own_slice(batch, self.ranks, weight.device)
        with passing(self.routing, batch, weight.device, own):
            hidden_cH = target_states(hf.base_model, own, hf.config._attn_implementation, weight.device)
        (values_C,) = self.ranks.gather(own.counts, hf.score(hidden_cH.to(weight.dtype))[:, 0].float())
        return values_C, torch.zeros_like(values_C)
