"""A ragged batch as the learner sees it: packed micro-batches in float64, run through the objective of a config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.objectives import GrpoObjective, MicroBatchData
from grpo_ray.batch.pack import PackItem, pack
from grpo_ray.batch.segments import Segments
from grpo_ray.config.algorithm import AlgorithmConfig
from tests.naive_losses import MAX_LENGTH, OPTIONS, Batch


def algorithm(loss: str, **values: Any) -> AlgorithmConfig:
    """With the bounds of OPTIONS, where the objective has them."""
    bounds: dict[str, Any] = {}
    if loss not in ("cispo", "sapo"):
        bounds = {"epsilon_low": OPTIONS.epsilon_low, "epsilon_high": OPTIONS.epsilon_high}
    if loss == "cispo":
        bounds = {"cispo_max_ratio": OPTIONS.cispo_max_ratio}
    if loss == "sapo":
        bounds = {"sapo_temperature_neg": OPTIONS.sapo_temperature_neg}
    return AlgorithmConfig(loss=loss, **bounds | values)


def micro_batch(b: Batch, members: Sequence[int], objective: GrpoObjective, *, with_ref: bool) -> MicroBatchData:
    """Some sequences of the batch, with the normalizers of the whole batch."""
    n = Normalizers(num_sequences=len(b.lengths), num_tokens=sum(b.lengths), max_completion_length=MAX_LENGTH)
    items = [
        PackItem(np.zeros(2, int), np.zeros(b.lengths[i], int), np.zeros(b.lengths[i], np.float32), 0.0, 0.0, i)
        for i in members
    ]
    packed = pack(items)

    def flat(rows: Sequence[Tensor]) -> Tensor:
        return torch.cat([rows[i] for i in members])

    return MicroBatchData(
        packed,
        rollout_logps_C=flat(b.rollout),
        advantages_C=torch.cat([torch.full_like(b.old[i], b.advantages[i]) for i in members]),
        weights_C=torch.cat([torch.full_like(b.old[i], objective.weight(b.lengths[i], n)) for i in members]),
        segments=Segments.of(torch.from_numpy(packed.segments)),
        old_logps_C=flat(b.old) if objective.algorithm.old_logprobs == "recompute" else None,
        ref_logps_C=flat(b.ref) if with_ref else None,
    )


def run(
    config: AlgorithmConfig, b: Batch, split: Sequence[Sequence[int]] | None = None
) -> tuple[Tensor, dict[str, float]]:
    """The loss over all micro-batches, and the metrics. `split`: the sequences of each micro-batch; None: one of all."""
    objective = GrpoObjective(config)
    total, largest = torch.zeros((), dtype=torch.float64), 0.0
    sums = torch.zeros(len(objective.sum_names), dtype=torch.float64)
    for members in split or [range(len(b.lengths))]:
        data = micro_batch(b, members, objective, with_ref=config.beta > 0)
        theta, entropy = (torch.cat([rows[i] for i in members]) for rows in (b.theta, b.entropy))
        loss, new, gap = objective.loss(data, theta, entropy)
        total, sums, largest = total + loss, sums + new, max(largest, gap.item())
    named = dict(zip(objective.sum_names, sums.tolist(), strict=True))
    return total, objective.metrics(named, largest, 1)


def gradient(loss: Tensor, b: Batch) -> Tensor:
    """With respect to theta and the entropies, [2 C]."""
    grads = torch.autograd.grad(
        loss, [*b.theta, *b.entropy], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat(list(grads))
