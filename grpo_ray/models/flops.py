"""Model FLOPs utilization (MFU): the fraction of its device's arithmetic that the learner uses.

    MFU = model FLOPs of the update / (seconds x ranks x peak FLOPs of one device)

Model FLOPs as in PaLM, appendix B (2204.02311): a token takes 6 N + 12 L H Q T for forward and backward. N weights that it is
multiplied with, L layers of H heads of size Q, T the length of its sequence. Whatever else an implementation computes (activations
again under gradient checkpointing, padding, dummies) does not count, and a causal mask does not halve the attention term.

Of the 6 N two are the forward pass, two the gradient of the activations, two that of the weights, which frozen weights do not
have. The output layer is computed for completion tokens alone here, so its weights count for those alone; looking a token up in
the embeddings takes no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from grpo_ray.batch.plan import MiniBatchPlan
from grpo_ray.types import TrainBatch, TrainSample

PEAK_BF16 = (
    ("h100 nvl", 835e12),
    ("h100 pcie", 756e12),
    ("h100", 989e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("b200", 2250e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l4", 121e12),
    ("a10", 125e12),
)
"""(words in the device's name, FLOPs per second), dense bfloat16 in NVIDIA's data sheets; the first entry with all words
applies."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelShape:
    body: int
    """The number of weights that every token is multiplied with: all but the embeddings and the output layer."""
    frozen_body: int
    """The number of these weights that are not trained."""
    head: int
    """The number of weights of the output layer, which only completion tokens are multiplied with."""
    frozen_head: int
    attention: int
    """L x H x Q: layers, heads, size of a head."""


def model_shape(hf: nn.Module) -> ModelShape | None:
    """The shape of a Transformers model, also of one that ZeRO-3 shards. None for a mixture of experts, since configs have no
    common way to state the part that a token uses, and for a model without attention."""
    model: Any = hf
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS) or not getattr(config, "num_attention_heads", None):
        return None
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    # A reward model has none: its one output is an ordinary row.
    head = None if output is None else output.weight
    rest = [p for p in hf.parameters() if p is not head and p is not embedding]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        body=sum(_size(p) for p in rest),
        frozen_body=sum(_size(p) for p in rest if not p.requires_grad),
        head=0 if head is None else _size(head),
        frozen_head=0 if head is None or head.requires_grad else _size(head),
        attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
    )


def forward_flops(shape: ModelShape, lengths_S: Sequence[int], targets_S: Sequence[int], shared: int = 0) -> float:
    """The FLOPs of one pass without gradients over S sequences.

    Args:
        shape: the shape of the model.
        lengths_S: [S] numbers of input tokens.
        targets_S: [S] numbers of completion tokens that are predicted.
        shared: the number of prompt tokens that another sequence has already computed, except for their attention.
    """
    attention = 4.0 * shape.attention * sum(n * n for n in lengths_S)
    return 2.0 * (shape.body * (sum(lengths_S) - shared) + shape.head * sum(targets_S)) + attention


def train_flops(shape: ModelShape, lengths_S: Sequence[int], targets_S: Sequence[int], shared: int = 0) -> float:
    """The FLOPs of one forward and backward pass: three times the forward pass, without the gradients of frozen weights."""
    frozen = 2.0 * (shape.frozen_body * (sum(lengths_S) - shared) + shape.frozen_head * sum(targets_S))
    return 3.0 * forward_flops(shape, lengths_S, targets_S, shared) - frozen


@dataclass(frozen=True)
class UpdatePasses:
    """The passes of an update over every sample."""

    train: int
    """The number of forward and backward passes of the policy, `num_iterations`."""
    reference: bool
    """Whether the reference policy has a forward pass."""
    old: bool
    """Whether the policy has a forward pass for old_logps of every mini-batch but the first."""
    critic: bool
    """Whether the critic has a forward pass, and as many forward and backward passes as the policy."""
    old_of_first: bool = False
    """Whether the pass of `old` also runs for the first mini-batch."""


def update_flops(
    shape: ModelShape,
    batch: TrainBatch,
    plan: Sequence[MiniBatchPlan],
    passes: UpdatePasses,
    *,
    shared_prompts: bool = False,
) -> float:
    """The FLOPs of one update on all ranks. The critic counts as a policy without output layer, trained as a whole.

    Args:
        shape: the shape of the model.
        batch: all samples of the update.
        plan: which samples are computed, and which of them together.
        passes: the passes over each sample.
        shared_prompts: whether neighbours of a group in a micro-batch compute their prompt once, except for its attention.
    """
    critic = replace(shape, frozen_body=0, head=0, frozen_head=0)
    total = 0.0
    for number, mini_batch in enumerate(plan):
        micros = [[batch.samples[i] for i in micro] for rank in mini_batch.ranks for micro in rank]
        samples = [s for micro in micros for s in micro]
        shared = sum(_shared(micro) for micro in micros) if shared_prompts else 0
        # The last token of a sequence is a target but no input.
        lengths_S = [s.num_prompt_tokens + s.num_tokens - 1 for s in samples]
        targets_S = [s.num_sampled for s in samples]
        forwards = passes.reference + (passes.old and (number > 0 or passes.old_of_first))
        total += passes.train * train_flops(shape, lengths_S, targets_S, shared)
        total += forwards * forward_flops(shape, lengths_S, targets_S, shared)
        if passes.critic:
            total += passes.train * train_flops(critic, lengths_S, targets_S, shared)
            total += forward_flops(critic, lengths_S, targets_S, shared)
    return total


class FlopCounter:
    """A counter of the model FLOPs of one update on all ranks, added up as its passes run: each part counts as it was planned."""

    def __init__(self, shape: ModelShape | None, *, shared_prompts: bool) -> None:
        self._shape = shape
        self._shared_prompts = shared_prompts
        self._total = 0.0

    def restart(self) -> None:
        self._total = 0.0

    def add(self, batch: TrainBatch, plan: Sequence[MiniBatchPlan], passes: UpdatePasses) -> None:
        """Count these mini-batches with these passes."""
        if self._shape is not None:
            self._total += update_flops(self._shape, batch, plan, passes, shared_prompts=self._shared_prompts)

    @property
    def total(self) -> float | None:
        """The sum; None for a model whose FLOPs can't be counted."""
        return None if self._shape is None else self._total


def _shared(micro: Sequence[TrainSample]) -> int:
    """The number of prompt tokens that neighbours of one group have in common, not counting the first of them."""
    return sum(b.num_prompt_tokens for a, b in pairwise(micro) if a.group == b.group)


def throughput_metrics(
    flops: float | None, num_tokens: float, seconds: float, num_ranks: int, device_name: str, dtype: str
) -> dict[str, float]:
    """The throughput metrics of one update, named as in `grpo_ray.telemetry.catalogue`. Unknown ones are left out: FLOPs of a model
    that can't be counted, the peak of an unknown device, of a CPU, and of float32.

    Args:
        flops: the sum of `FlopCounter`, over all ranks.
        device_name: the name that CUDA reports; empty for a CPU.
        dtype: the model's dtype, `bfloat16` or `float32`.
    """
    if seconds <= 0:
        return {}
    out = {"throughput/learner_tokens_per_s": num_tokens / seconds}
    if flops is None:
        return out
    each = flops / seconds / num_ranks
    out["throughput/learner_tflops"] = each / 1e12
    peak = peak_flops(device_name) if dtype == "bfloat16" else None
    return out | ({"throughput/mfu": each / peak} if peak else {})


def peak_flops(device_name: str) -> float | None:
    """The peak dense bfloat16 FLOPs per second. None for a device that is not in the table, or a part of one (MIG)."""
    words = device_name.lower().replace("-", " ").split()
    if "mig" in words:
        return None
    return next((peak for name, peak in PEAK_BF16 if set(name.split()) <= set(words)), None)


def _size(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))
