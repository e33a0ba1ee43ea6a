"""PPO's critic: a language model's body with one output, and what becomes of its values.

C completion tokens of one micro-batch, S sequences, T tokens of the longest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_ray.algorithm.advantages import gae, kl_in_reward
from grpo_ray.batch.pack import PackedBatch
from grpo_ray.batch.segments import Segments
from grpo_ray.batch.sequence import Alone, SequenceRanks
from grpo_ray.models.policy import own_slice, target_states


class ValueModel(nn.Module):
    """V of the text before each completion token. The head starts at zero, so every value does."""

    def __init__(self, hf: nn.Module, ranks: SequenceRanks | None = None) -> None:
        super().__init__()
        self.ranks = ranks or Alone()
        config: Any = hf.config
        self.body = hf.base_model
        self.attention = config._attn_implementation
        self.head = nn.Linear(config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: PackedBatch) -> Tensor:
        """[C], fp32."""
        own = own_slice(batch, self.ranks, self.head.weight.device)
        hidden_cH = target_states(self.body, own, self.attention, self.head.weight.device)
        (values_C,) = self.ranks.gather(own.counts, self.head(hidden_cH.to(self.head.weight.dtype))[:, 0].float())
        return values_C


def gae_of_segments(
    scores_S: Tensor,
    kl_C: Tensor | None,
    values_C: Tensor,
    segments: Segments,
    *,
    beta: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """`advantages.gae` over packed sequences, each with its score at its last token, less the KL of every token.

    Args:
        scores_S: [S].
        kl_C: [C]; None: no KL in the reward.
        values_C: [C].
        segments: which token is of which sequence.
        beta: weight of the KL.
        gamma: discount.
        lam: lambda of GAE.

    Returns:
        Advantages and returns, [C] each.
    """
    lengths_S = segments.lengths_S
    ends_S = lengths_S.cumsum(0)
    places_C = torch.arange(len(values_C), device=values_C.device) - (ends_S - lengths_S)[segments.index_N]
    shape = (len(lengths_S), int(lengths_S.max()))
    values_ST, kl_ST = values_C.new_zeros(shape), values_C.new_zeros(shape)
    values_ST[segments.index_N, places_C] = values_C
    if kl_C is not None:
        kl_ST[segments.index_N, places_C] = kl_C
    mask_ST = torch.arange(shape[1], device=values_C.device)[None] < lengths_S[:, None]
    rewards_ST = kl_in_reward(scores_S, kl_ST, mask_ST, beta=beta)
    advantages_ST, returns_ST = gae(rewards_ST, values_ST, mask_ST, gamma=gamma, lam=lam)
    return advantages_ST[segments.index_N, places_C], returns_ST[segments.index_N, places_C]
