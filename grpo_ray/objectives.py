"""What one micro-batch adds to the loss and to the metrics, for each kind of training. Pure torch.

C: completion tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo_ray.batching import PackedBatch
from grpo_ray.config import AlgorithmConfig
from grpo_ray.losses.aggregation import AGGREGATIONS, Normalizers
from grpo_ray.losses.kl import kl_loss
from grpo_ray.losses.policy import policy_loss
from grpo_ray.losses.sft import sft_loss


@dataclass
class MicroBatchData:
    """One micro-batch on its device; `old_C` and `ref_C` are filled in on the way."""

    packed: PackedBatch
    rollout_C: Tensor
    advantages_C: Tensor
    weights_C: Tensor
    old_C: Tensor | None = None
    """Log-probabilities of the learner for the version that sampled. None: the pass under way is that version."""
    ref_C: Tensor | None = None
    """Log-probabilities of the reference model."""

    @classmethod
    def of(cls, packed: PackedBatch, device: torch.device) -> MicroBatchData:
        rollout, advantages, weights = (
            torch.from_numpy(x).to(device) for x in (packed.rollout_logprobs, packed.advantages, packed.weights)
        )
        return cls(packed, rollout, advantages, weights)


class Objective(Protocol):
    @property
    def sum_names(self) -> Sequence[str]:
        """What `loss` counts up over tokens, in the order of its second result."""
        ...

    @property
    def weight(self) -> Callable[[int, Normalizers], float]:
        """Weight of each token of a sequence of so many completion tokens."""
        ...

    def loss(self, data: MicroBatchData, theta_C: Tensor, entropy_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The micro-batch's part of the loss (0-dim), its sums [len(sum_names)], and its largest mismatch (0-dim)."""
        ...

    def metrics(self, sums: dict[str, float], largest_mismatch: float, num_steps: int) -> dict[str, float]:
        """From the sums over all micro-batches, learners and the `num_steps` optimizer steps."""
        ...


class GrpoObjective:
    """The clipped policy objective, plus beta x KL to the reference."""

    sum_names = (
        "tokens",
        "entropy",
        "loss",
        "kl_loss",
        "kl_ref",
        "ratio",
        "clip_low",
        "clip_high",
        "approx_kl",
        "mismatch",
    )

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = algorithm
        self.weight = AGGREGATIONS[algorithm.loss]

    def loss(self, data: MicroBatchData, theta_C: Tensor, entropy_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.algorithm
        if data.old_C is None:
            data.old_C = theta_C.detach()
        loss, stats = policy_loss(
            theta_C,
            data.old_C,
            data.rollout_C,
            data.advantages_C,
            data.weights_C,
            clip_low=a.epsilon_low,
            clip_high=a.epsilon_high,
        )
        kl, kl_sum = loss.new_zeros(()), loss.new_zeros(())
        if data.ref_C is not None:
            kl, kl_sum = kl_loss(theta_C, data.ref_C, data.weights_C, estimator=a.kl_estimator)
            loss = loss + a.beta * kl
        sums = [
            loss.new_tensor(len(theta_C)),
            entropy_C.detach().sum(),
            stats.loss,
            kl.detach(),
            kl_sum,
            stats.ratio,
            stats.clip_low,
            stats.clip_high,
            stats.approx_kl,
            stats.mismatch_abs,
        ]
        return loss, torch.stack(sums), stats.mismatch_max

    def metrics(self, sums: dict[str, float], largest_mismatch: float, num_steps: int) -> dict[str, float]:
        tokens = max(sums["tokens"], 1.0)
        out = {
            "loss/policy": sums["loss"] / num_steps,
            "entropy": sums["entropy"] / tokens,
            "ratio/mean": sums["ratio"] / tokens,
            "clip/low": sums["clip_low"] / tokens,
            "clip/high": sums["clip_high"] / tokens,
            "kl/old": sums["approx_kl"] / tokens,
            "mismatch/mean_abs": sums["mismatch"] / tokens,
            "mismatch/max_abs": largest_mismatch,
        }
        if self.algorithm.beta > 0:
            out |= {"loss/kl": self.algorithm.beta * sums["kl_loss"] / num_steps, "kl/ref": sums["kl_ref"] / tokens}
        return out


class SftObjective:
    """Cross-entropy, a mean over all completion tokens of the step."""

    sum_names = ("tokens", "entropy", "loss")

    def __init__(self) -> None:
        self.weight = AGGREGATIONS["dapo"]

    def loss(self, data: MicroBatchData, theta_C: Tensor, entropy_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = sft_loss(theta_C, data.weights_C)
        sums = torch.stack([loss.new_tensor(len(theta_C)), entropy_C.detach().sum(), loss.detach()])
        return loss, sums, loss.new_zeros(())

    def metrics(self, sums: dict[str, float], largest_mismatch: float, num_steps: int) -> dict[str, float]:
        return {"loss/sft": sums["loss"] / num_steps, "entropy": sums["entropy"] / max(sums["tokens"], 1.0)}
