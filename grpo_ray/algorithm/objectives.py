"""Objectives: the loss and the metric sums of one micro-batch, for each kind of training. Pure torch.

C: completion tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from grpo_ray.algorithm.losses.aggregation import Normalizers, token_mean
from grpo_ray.algorithm.losses.bounds import bounded_k3
from grpo_ray.algorithm.losses.correction import CorrectionOptions, correction_sums, correction_weights
from grpo_ray.algorithm.losses.kl import kl_loss
from grpo_ray.algorithm.losses.policy import LossOptions, PolicyInputs, TokenLosses
from grpo_ray.algorithm.losses.sft import sft_loss
from grpo_ray.algorithm.users_called import loss_of
from grpo_ray.batch.device import on_device
from grpo_ray.batch.pack import PackedBatch
from grpo_ray.batch.segments import Segments
from grpo_ray.batch.slopes import Slopes
from grpo_ray.batch.truncation import TokenSets
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.types import TrainSample

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


@dataclass
class MicroBatchData:
    """One micro-batch on its device; optional fields are filled in step by step."""

    packed: PackedBatch
    rollout_logps_C: Float[Tensor, "C"]
    advantages_C: Float[Tensor, "C"]
    """The advantages; NaN until they are computed, where the learner does it."""
    weights_C: Float[Tensor, "C"]
    segments: Segments
    old_logps_C: Float[Tensor, "C"] | None = None
    """old_logps: the learner's log-probabilities under the version that sampled. None: the current pass is by that version."""
    ref_logps_C: Float[Tensor, "C"] | None = None
    """ref_logps: log-probabilities under the reference model."""
    rewards_S: Float[Tensor, "S"] | None = None
    """The reward of each sequence, from which a critic's advantages are computed."""
    targets_S: Float[Tensor, "S"] | None = None
    """What a reward model learns of each sequence: the margin of its pair, or its label."""
    ref_logps_S: Float[Tensor, "S"] | None = None
    """ref_logps summed over each completion, which DPO gets with its samples."""
    kl_C: Float[Tensor, "C"] | None = None
    """KL to the reference of a policy that is not being trained right now; None: it is not subtracted from the reward."""
    values_C: Float[Tensor, "C"] | None = None
    """The critic's values when the advantages were computed."""
    returns_C: Float[Tensor, "C"] | None = None
    """The critic's targets."""
    current_C: Bool[Tensor, "C"] | None = None
    """Whether the token was sampled by the version that the update starts with; None: all were. Only these tokens show a
    mismatch."""
    sets: TokenSets | None = None
    """The set of tokens that the rollout engine could sample in the place of each; None: all."""
    moved: bool = False
    """Whether the weights have moved since the update began."""

    @classmethod
    def of(cls, packed: PackedBatch, device: torch.device, samples: Sequence[TrainSample] = ()) -> MicroBatchData:
        """Move a micro-batch to its device; `samples` are those of its sequences, in order."""
        rollout, advantages, weights, index = (
            on_device(x, device) for x in (packed.rollout_logprobs, packed.advantages, packed.weights, packed.segments)
        )
        current = on_device(packed.current, device)
        data = cls(packed, rollout, advantages, weights, Segments.of(index), current_C=current)
        num = len(data.segments.lengths_S)

        def floats(values: list[float]) -> Tensor:
            return on_device(np.array(values, np.float32), device)

        # A dummy has a sequence and no sample.
        data.rewards_S = floats([s.reward for s in samples] or [0.0] * num)
        data.targets_S = floats([s.target for s in samples] or [0.0] * num)
        ref_logps = [s.ref_logps for s in samples if s.ref_logps is not None]
        data.ref_logps_S = floats(ref_logps) if ref_logps else None
        return data

    def tokens(self, rows: slice) -> MicroBatchData:
        """Some of the tokens with what each has of its own, as if they were one sequence."""
        own = {name: value[rows] for name in _OF_TOKENS if (value := getattr(self, name)) is not None}
        return replace(self, **own, segments=Segments.of(torch.zeros_like(self.segments.index_N[rows])))


_OF_TOKENS = [each.name for each in fields(MicroBatchData) if each.name.endswith("_C")]


class Objective(Protocol):
    @property
    def sum_names(self) -> Sequence[str]:
        """The names of the token sums that `loss` returns, in the order of its second result."""
        ...

    @property
    def weighted_sums(self) -> Sequence[str]:
        """The names of those sums that contain the weights of the tokens."""
        ...

    @property
    def weight(self) -> Callable[[int, Normalizers], float]:
        """The weight of each token of a sequence of so many completion tokens."""
        ...

    @property
    def pairs(self) -> bool:
        """Whether samples 2k and 2k + 1 of a batch are a pair that one micro-batch has to hold."""
        ...

    def value(self, logps_C: Float[Tensor, "C"], segments: Segments) -> Float[Tensor, "S"]:
        """[S] the model's value of each sequence: its log-probability, or a score."""
        ...

    def has_gradient(self, advantage: float | None) -> bool:
        """Whether a sample with this advantage (None: not computed yet) can contribute to the gradient."""
        ...

    def loss(
        self, data: MicroBatchData, logps_C: Float[Tensor, "C"], entropy_C: Float[Tensor, "C"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "num_sums"], Float[Tensor, ""]]:
        """The micro-batch's part of the loss (0-dim), its sums [len(sum_names)], and its largest mismatch (0-dim)."""
        ...

    def slopes(self, data: MicroBatchData) -> Slopes | None:
        """The derivatives of `loss`, of some tokens at a time; None: they are not known before all log-probabilities are."""
        ...

    def metrics(self, sums: dict[str, float], largest_mismatch: float, num_steps: int) -> dict[str, float]:
        """Metrics from the sums over all micro-batches, learner ranks and the `num_steps` optimizer steps."""
        ...


class GrpoObjective:
    """The policy loss, corrected for the rollout/training mismatch, plus beta x KL to the reference (unless it is in the reward),
    minus an entropy bonus.

    The correction weighs the policy loss alone; KL and entropy have the weights of the tokens and nothing else.
    """

    sum_names = (
        "tokens",
        "sequences",
        "entropy",
        "loss",
        "kl_loss",
        "kl_ref",
        "bonus",
        "ratio",
        "clip_low",
        "clip_high",
        "approx_kl",
        "compared",
        "mismatch",
        "mismatch_kl",
        "stale",
        "stale_shift",
        "weight",
        "weight_squared",
        "masked_tokens",
        "masked_sequences",
    )
    weighted_sums = ("loss", "kl_loss", "bonus")
    pairs = False

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self.algorithm = a = algorithm
        policy = loss_of(a)
        self.token_loss = policy.token_loss
        self.weight = policy.weight
        self._policy_by_token = policy.by_token
        self.options = LossOptions(
            epsilon_low=a.epsilon_low,
            epsilon_high=a.epsilon_high,
            dual_clip_c=a.dual_clip_c,
            cispo_max_ratio=a.cispo_max_ratio,
            sapo_temperature_pos=a.sapo_temperature_pos,
            sapo_temperature_neg=a.sapo_temperature_neg,
        )
        self.correction = CorrectionOptions(
            importance_sampling=a.importance_sampling,
            clip_min=a.importance_sampling_clip_min,
            clip_max=a.importance_sampling_clip_max,
            geometric_mask=a.geometric_mask,
            off_policy_mask_threshold=a.off_policy_mask_threshold,
        )

    def value(self, logps_C: Float[Tensor, "C"], segments: Segments) -> Float[Tensor, "S"]:
        return segments.sum(logps_C)

    def has_gradient(self, advantage: float | None) -> bool:
        a = self.algorithm
        return advantage != 0 or a.beta > 0 or a.entropy_coef > 0 or a.advantages_on_learner

    def loss(
        self, data: MicroBatchData, logps_C: Float[Tensor, "C"], entropy_C: Float[Tensor, "C"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "num_sums"], Float[Tensor, ""]]:
        a, weights_C = self.algorithm, data.weights_C
        if data.old_logps_C is None:
            data.old_logps_C = data.rollout_logps_C if a.old_logprobs == "rollout" else logps_C.detach()
        policy = self.token_loss(
            PolicyInputs(logps_C, data.old_logps_C, data.advantages_C, data.segments), self.options
        )
        # With rollout_logps as old_logps, the learner's own value is that of the current pass.
        log_w_C = (logps_C.detach() if a.old_logprobs == "rollout" else data.old_logps_C) - data.rollout_logps_C
        sums = _token_sums(logps_C.detach() - data.old_logps_C, policy, data.segments)
        largest = log_w_C.new_zeros(())
        if not (data.moved and a.old_logprobs == "rollout"):
            gaps, largest = _mismatch_sums(log_w_C, data.current_C)
            sums |= gaps
        sums["entropy"] = entropy_C.detach().sum()
        per_token_C = policy.loss_N
        if self.correction.any:
            correction_C = correction_weights(
                logps_C.detach(),
                data.old_logps_C,
                data.rollout_logps_C,
                data.advantages_C,
                data.segments,
                self.correction,
            )
            per_token_C = correction_C * per_token_C
            sums |= correction_sums(correction_C, data.segments)
        loss = (weights_C * per_token_C).sum()
        sums["loss"] = loss.detach()
        if data.ref_logps_C is not None and a.kl_in == "loss":
            kl, sums["kl_ref"] = kl_loss(
                logps_C, data.ref_logps_C, data.old_logps_C, weights_C, estimator=a.kl_estimator
            )
            loss = loss + a.beta * kl
            sums["kl_loss"] = kl.detach()
        if a.entropy_coef > 0:
            bonus = (weights_C * entropy_C).sum()
            loss = loss - a.entropy_coef * bonus
            sums["bonus"] = bonus.detach()
        zero = loss.new_zeros(())
        return loss, torch.stack([sums.get(name, zero) for name in self.sum_names]), largest

    def slopes(self, data: MicroBatchData) -> Slopes | None:
        if not self._policy_by_token or not self.correction.by_token or self.algorithm.entropy_coef > 0:
            return None

        def of(rows: slice, logps_C: Tensor) -> Tensor:
            part, leaf_C = data.tokens(rows), logps_C.detach().requires_grad_()
            with torch.enable_grad():
                loss = self.loss(part, leaf_C, torch.zeros_like(leaf_C))[0]
            (slope_C,) = torch.autograd.grad(loss, leaf_C)
            return slope_C

        return of

    def metrics(self, sums: dict[str, float], largest_mismatch: float, num_steps: int) -> dict[str, float]:
        a = self.algorithm
        tokens = sums["tokens"]
        if not tokens:
            # Nothing had a signal, so nothing was computed: a mean over no tokens is not 0.
            return {"loss/policy": 0.0}
        out = {
            "loss/policy": sums["loss"] / num_steps,
            "entropy": sums["entropy"] / tokens,
            "ratio/mean": sums["ratio"] / tokens,
            "clip/low": sums["clip_low"] / tokens,
            "clip/high": sums["clip_high"] / tokens,
            "kl/old": sums["approx_kl"] / tokens,
        }
        if compared := sums["compared"]:
            out |= {
                "mismatch/mean_abs": sums["mismatch"] / compared,
                "mismatch/max_abs": largest_mismatch,
                "mismatch/kl": sums["mismatch_kl"] / compared,
            }
        if stale := sums["stale"]:
            out["staleness/logp_shift"] = sums["stale_shift"] / stale
        if a.beta > 0 and a.kl_in == "loss":
            out |= {"loss/kl": a.beta * sums["kl_loss"] / num_steps, "kl/ref": sums["kl_ref"] / tokens}
        if a.entropy_coef > 0:
            out["loss/entropy"] = -a.entropy_coef * sums["bonus"] / num_steps
        if self.correction.any:
            squares = sums["weight_squared"]
            out |= {
                "correction/mean_weight": sums["weight"] / tokens,
                "correction/ess": sums["weight"] ** 2 / (tokens * squares) if squares > 0 else 0.0,
                "correction/masked_tokens": sums["masked_tokens"] / tokens,
                "correction/masked_sequences": sums["masked_sequences"] / max(sums["sequences"], 1.0),
            }
        return out


@torch.no_grad()
def _token_sums(
    log_ratio_C: Float[Tensor, "C"], policy: TokenLosses, segments: Segments
) -> dict[str, Float[Tensor, ""]]:
    dtype = log_ratio_C.dtype
    return {
        "tokens": log_ratio_C.new_full((), len(log_ratio_C)),
        "sequences": log_ratio_C.new_full((), len(segments.lengths_S)),
        "ratio": policy.ratio_N.sum(),
        "clip_low": policy.clip_low_N.sum().to(dtype),
        "clip_high": policy.clip_high_N.sum().to(dtype),
        "approx_kl": bounded_k3(-log_ratio_C).sum(),
    }


@torch.no_grad()
def _mismatch_sums(
    log_w_C: Float[Tensor, "C"], current_C: Bool[Tensor, "C"] | None
) -> tuple[dict[str, Float[Tensor, ""]], Float[Tensor, ""]]:
    """Mismatch sums of tokens of the same weights and, apart, of older ones; and the largest mismatch of the same weights."""
    current_C = torch.ones_like(log_w_C, dtype=torch.bool) if current_C is None else current_C
    gap_C = log_w_C.abs()
    own_C, older_C = gap_C.masked_fill(~current_C, 0.0), gap_C.masked_fill(current_C, 0.0)
    sums = {
        "compared": current_C.sum().to(gap_C.dtype),
        "mismatch": own_C.sum(),
        "mismatch_kl": bounded_k3(-log_w_C).masked_fill(~current_C, 0.0).sum(),
        "stale": (~current_C).sum().to(gap_C.dtype),
        "stale_shift": older_C.sum(),
    }
    return sums, own_C.max()


class SftObjective:
    """Cross-entropy, a mean over all completion tokens of the step."""

    sum_names = ("tokens", "entropy", "loss")
    weighted_sums = ("loss",)
    pairs = False

    def __init__(self) -> None:
        self.weight = token_mean

    def value(self, logps_C: Float[Tensor, "C"], segments: Segments) -> Float[Tensor, "S"]:
        return segments.sum(logps_C)

    def has_gradient(self, _advantage: float | None) -> bool:
        return True

    def loss(
        self, data: MicroBatchData, logps_C: Float[Tensor, "C"], entropy_C: Float[Tensor, "C"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "num_sums"], Float[Tensor, ""]]:
        loss = sft_loss(logps_C, data.weights_C)
        sums = torch.stack([loss.new_full((), len(logps_C)), entropy_C.detach().sum(), loss.detach()])
        return loss, sums, loss.new_zeros(())

    def slopes(self, data: MicroBatchData) -> Slopes | None:
        return lambda rows, _logps_C: -data.weights_C[rows]

    def metrics(self, sums: dict[str, float], _largest_mismatch: float, num_steps: int) -> dict[str, float]:
        if not sums["tokens"]:
            return {}
        return {"loss/sft": sums["loss"] / num_steps, "entropy": sums["entropy"] / sums["tokens"]}
