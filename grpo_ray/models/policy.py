"""A Hugging Face causal language model that maps packed micro-batches to log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo_ray.batch.device import on_device
from grpo_ray.batch.pack import PackedBatch
from grpo_ray.batch.sequence import Alone, SequenceRanks, Slice, slice_of
from grpo_ray.batch.slopes import Slopes
from grpo_ray.batch.truncation import TokenSets
from grpo_ray.models.attention import attention_kwargs
from grpo_ray.models.features.logits import logit_map
from grpo_ray.models.features.routing import Routing, passing
from grpo_ray.models.linear import multiple_of_tokens
from grpo_ray.models.logprobs import LogprobHead
from grpo_ray.models.plain import head_inputs


class PolicyModel(nn.Module):
    """The policy. `hf` keeps its parameter names (after the prefix `hf.`); its output layer becomes a `LogprobHead` over the same
    weight.

    Raises:
        ValueError: the model changes its logits in a way that the head would omit.
    """

    def __init__(
        self,
        hf: nn.Module,
        *,
        chunk: int,
        ranks: SequenceRanks | None = None,
        plain: bool = False,
        routing: Routing | None = None,
    ) -> None:
        super().__init__()
        self.logit_map = logit_map(hf, whole=plain)
        hf.set_output_embeddings(LogprobHead(hf.get_output_embeddings(), self.logit_map))  # type: ignore[operator]
        self.hf = hf
        self.chunk = chunk
        self.ranks = ranks or Alone()
        self.plain = plain
        """Whether it goes by `grpo_ray.models.plain`, without slices."""
        self.routing = routing
        """Its routers; None: it has none, or nobody looks at them."""

    def forward(
        self, batch: PackedBatch, temperature: float, sets: TokenSets | None = None, slopes: Slopes | None = None
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities [C] of the batch's targets and the entropies [C], fp32; with sets, of the distributions over these.
        Each rank that shares a micro-batch has the sets of its own slice, and no use for slopes, which are of all rows."""
        hf: Any = self.hf
        device = hf.get_output_embeddings().weight.device
        if self.plain:
            with passing(self.routing, batch, device):
                hidden_CH = head_inputs(hf, batch, device)
            targets = on_device(batch.targets, device)
            found: tuple[Tensor, Tensor] = hf.get_output_embeddings()(
                hidden_CH, targets, temperature, self.chunk, sets, slopes
            )
            return found
        own = own_slice(batch, self.ranks, device)
        with passing(self.routing, batch, device, own):
            hidden_cH = target_states(hf.base_model, own, hf.config._attn_implementation, device)
        hidden_cH = self.logit_map.before(hf, hidden_cH)
        targets = on_device(own.targets, device)
        if self.ranks.size > 1:
            slopes = None
        logp_c, entropy_c = hf.get_output_embeddings()(hidden_cH, targets, temperature, self.chunk, sets, slopes)
        logp_C, entropy_C = self.ranks.gather(own.counts, logp_c, entropy_c)
        return logp_C, entropy_C


def check_head(hf: nn.Module, *, plain: bool = False) -> None:
    """Raises ValueError for a Transformers model that changes its logits in a way that `LogprobHead` would omit."""
    logit_map(hf, whole=plain)


def own_slice(batch: PackedBatch, ranks: SequenceRanks, device: torch.device) -> Slice:
    """The slice of a micro-batch that this rank computes on this device."""
    multiple = multiple_of_tokens(len(batch.input_ids) // ranks.size, device)
    return slice_of(batch, ranks.rank, ranks.size, multiple)


def target_states(body: Any, own: Slice, attention: str, device: torch.device) -> Tensor:
    """The hidden states [c, H] of a Transformers model without its head, at the tokens that predict a completion token."""
    hidden_nH: Tensor = body(
        input_ids=on_device(own.input_ids, device)[None],
        position_ids=on_device(own.position_ids, device)[None],
        use_cache=False,
        **attention_kwargs(own.lengths, own.sequences, attention, device),
    ).last_hidden_state[0]
    return hidden_nH[on_device(own.target_rows, device)]
