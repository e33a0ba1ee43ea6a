"""Objectives over preference pairs: DPO and reward models. The two answers of a pair are neighbours in a micro-batch, chosen first.

C completion tokens of one micro-batch, S its sequences, P its pairs (S = 2 P).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers
from grpo_ray.algorithm.losses.dpo import dpo_loss, ipo_loss
from grpo_ray.algorithm.losses.reward_model import bradley_terry_loss, point_loss
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.batch.segments import Segments
from grpo_ray.config.supervised import DpoOptions, RewardModelOptions

if TYPE_CHECKING:
    from jaxtyping import Float


def pair_mean(_length: int, n: Normalizers) -> float:
    """Mean over pairs: the weight of either sequence."""
    return 2.0 / n.num_sequences


def sequence_weight(_length: int, n: Normalizers) -> float:
    """Mean over sequences, whatever their length."""
    return 1.0 / n.num_sequences


class DpoObjective:
    """The DPO objective. The reference's log-probabilities come with the samples."""

    sum_names = ("pairs", "loss", "accurate", "chosen", "rejected", "chosen_logp", "rejected_logp", "tokens", "entropy")
    weighted_sums = ("loss",)
    pairs = True

    def __init__(self, options: DpoOptions) -> None:
        self.options = options
        self.weight = pair_mean

    def has_gradient(self, _advantage: float | None) -> bool:
        return True

    def slopes(self, _data: MicroBatchData) -> None:
        return None

    def value(self, logps_C: Float[Tensor, "C"], segments: Segments) -> Float[Tensor, "S"]:
        """[S] the log-probability of each completion."""
        return segments.sum(logps_C)

    def loss(
        self, data: MicroBatchData, logps_C: Float[Tensor, "C"], entropy_C: Float[Tensor, "C"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "num_sums"], Float[Tensor, ""]]:
        if data.packed.is_dummy:
            return _nothing(logps_C, len(self.sum_names))
        beta, segments = self.options.beta, data.segments
        assert data.ref_logps_S is not None
        logps_S = segments.sum(logps_C)
        ratio_S = logps_S - data.ref_logps_S
        weights_P = segments.mean(data.weights_C)[::2]
        if self.options.loss == "ipo":
            mean_S = ratio_S / segments.lengths_S
            loss = ipo_loss(mean_S[::2], mean_S[1::2], weights_P, beta=beta)
        else:
            loss = dpo_loss(ratio_S[::2], ratio_S[1::2], weights_P, beta=beta)
        chosen_P, rejected_P = (beta * ratio_S.detach()).view(-1, 2).unbind(1)
        sums = [
            loss.new_full((), len(chosen_P)),
            loss.detach(),
            (chosen_P > rejected_P).to(loss.dtype).sum(),
            chosen_P.sum(),
            rejected_P.sum(),
            logps_S[::2].detach().sum(),
            logps_S[1::2].detach().sum(),
            loss.new_full((), len(logps_C)),
            entropy_C.detach().sum(),
        ]
        return loss, torch.stack(sums), loss.new_zeros(())

    def metrics(self, sums: dict[str, float], _largest_mismatch: float, num_steps: int) -> dict[str, float]:
        pairs = max(sums["pairs"], 1.0)
        return {
            "loss/dpo": sums["loss"] / num_steps,
            "entropy": sums["entropy"] / max(sums["tokens"], 1.0),
            "logps/chosen": sums["chosen_logp"] / pairs,
            "logps/rejected": sums["rejected_logp"] / pairs,
            **_pair_metrics(sums),
        }


class RewardModelObjective:
    """The reward model objective: a sequence's score is the model's output at its last token."""

    sum_names = ("pairs", "loss", "accurate", "chosen", "rejected", "sequences", "score", "error")
    weighted_sums = ("loss",)

    def __init__(self, options: RewardModelOptions) -> None:
        self.options = options
        self.pairs = options.pairwise
        self.weight = pair_mean if options.pairwise else sequence_weight

    def has_gradient(self, _advantage: float | None) -> bool:
        return True

    def slopes(self, _data: MicroBatchData) -> None:
        return None

    def value(self, logps_C: Float[Tensor, "C"], segments: Segments) -> Float[Tensor, "S"]:
        """[S] the scores."""
        return logps_C[segments.lengths_S.cumsum(0) - 1]

    def loss(
        self, data: MicroBatchData, logps_C: Float[Tensor, "C"], _entropy_C: Float[Tensor, "C"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "num_sums"], Float[Tensor, ""]]:
        if data.packed.is_dummy:
            return _nothing(logps_C, len(self.sum_names))
        scores_S = self.value(logps_C, data.segments)
        assert data.targets_S is not None
        targets_S = data.targets_S
        weights_S = data.segments.mean(data.weights_C)
        zero = logps_C.new_zeros(())
        told = scores_S.detach()
        if self.pairs:
            loss = bradley_terry_loss(scores_S[::2], scores_S[1::2], targets_S[::2], weights_S[::2])
            sums = [
                loss.new_full((), len(told) // 2),
                loss.detach(),
                (told[::2] > told[1::2]).to(loss.dtype).sum(),
                told[::2].sum(),
                told[1::2].sum(),
            ]
        else:
            loss = point_loss(scores_S, targets_S, weights_S, kind=self.options.loss)
            right_S = (told > 0) == (targets_S > 0.5)
            sums = [zero, loss.detach(), right_S.to(loss.dtype).sum(), zero, zero]
        sums += [loss.new_full((), len(told)), told.sum(), (told - targets_S).abs().sum()]
        return loss, torch.stack(sums), zero

    def metrics(self, sums: dict[str, float], _largest_mismatch: float, num_steps: int) -> dict[str, float]:
        sequences = max(sums["sequences"], 1.0)
        out = {"loss/reward_model": sums["loss"] / num_steps, "score/mean": sums["score"] / sequences}
        if self.pairs:
            return out | _pair_metrics(sums)
        if self.options.loss == "bce":
            return out | {"score/accuracy": sums["accurate"] / sequences}
        return out | {"score/error": sums["error"] / sequences}


def _nothing(
    logps_C: Float[Tensor, "C"], num_sums: int
) -> tuple[Float[Tensor, ""], Float[Tensor, "num_sums"], Float[Tensor, ""]]:
    """Zero loss and sums of a dummy micro-batch, which takes part in the passes of all ranks and adds nothing."""
    zero = logps_C.new_zeros(())
    return (logps_C * 0).sum(), logps_C.new_zeros(num_sums), zero


def _pair_metrics(sums: dict[str, float]) -> dict[str, float]:
    pairs = max(sums["pairs"], 1.0)
    return {
        "pairs/accuracy": sums["accurate"] / pairs,
        "pairs/margin": (sums["chosen"] - sums["rejected"]) / pairs,
        "pairs/chosen": sums["chosen"] / pairs,
        "pairs/rejected": sums["rejected"] / pairs,
    }
