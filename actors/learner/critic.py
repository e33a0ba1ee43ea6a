"""PPO's critic beside the policy: a DeepSpeed engine of its own on every rank, which computes the advantages.

values -> GAE -> advantages, whitened over all tokens of the step and all ranks -> the policy's update
              -> returns -> the critic's own update, on the same micro-batches
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.learner.build import LearnerSpec, build_critic, step
from grpo_ray.algorithm.advantages import gae_of_segments
from grpo_ray.algorithm.losses.value import value_loss
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.batch.sequence import SequenceRanks
from grpo_ray.errors import NonFiniteError
from grpo_ray.spread import tolerance

_SUMS = ("tokens", "loss", "error", "value", "return", "return_squared")


class Critic:
    def __init__(self, spec: LearnerSpec, device: torch.device, ranks: SequenceRanks) -> None:
        self.engine: Any = build_critic(spec, device, ranks)
        self._counts = ranks.rank == 0
        """Whether this rank counts: one of the ranks that share a micro-batch does."""
        self._spec = spec
        assert spec.algorithm is not None
        self._algorithm = spec.algorithm
        self._sums = torch.zeros(len(_SUMS), device=device, dtype=torch.float64)
        self._grad_norms: list[float] = []

    @torch.no_grad()
    def set_advantages(self, micro_batches: list[MicroBatchData]) -> None:
        """Fill in whitened advantages of the rewards, less the KL where there is one; and values and returns.

        They are whitened as in the PPO of RLHF: minus the mean, over the standard deviation of all tokens of the step.
        """
        a = self._algorithm
        moments = torch.zeros(3, device=self._sums.device, dtype=torch.float64)
        for data in micro_batches:
            values_C: Tensor = self.engine(data.packed)
            assert data.rewards_S is not None
            advantages_C, returns_C = gae_of_segments(
                data.rewards_S, data.kl_C, values_C, data.segments, beta=a.beta, gamma=a.gamma, lam=a.lam
            )
            data.values_C, data.returns_C, data.advantages_C = values_C, returns_C, advantages_C
            if self._counts and not data.packed.is_dummy:
                x = advantages_C.double()
                moments += torch.stack([x.new_full((), len(x)), x.sum(), x.square().sum()])
        dist.all_reduce(moments)
        num, total, squares = moments.tolist()
        mean = total / max(num, 1.0)
        square = squares / max(num, 1.0)
        std = max(square - mean**2, 0.0) ** 0.5
        # Equal advantages carry no signal: what is left of them is rounding.
        scale = 1 / (std + a.std_eps) if std > tolerance(square**0.5) else 0.0
        for data in micro_batches:
            data.advantages_C = (data.advantages_C - mean) * scale

    def update(self, mini_batch: list[MicroBatchData], num_tokens: int, num_ranks: int) -> None:
        """Take one optimizer step of the critic; the loss is a mean over the `num_tokens` of the mini-batch on all ranks."""
        for data in mini_batch:
            assert data.values_C is not None
            assert data.returns_C is not None
            values_C: Tensor = self.engine(data.packed)
            weight = 0.0 if data.packed.is_dummy else 1 / num_tokens
            loss = value_loss(
                values_C,
                data.values_C,
                data.returns_C,
                torch.full_like(values_C, weight),
                clip_range=self._spec.critic.value_clip_range,
            )
            self.engine.backward(loss * num_ranks, scale_wrt_gas=False)
            if self._counts and not data.packed.is_dummy:
                self._count(values_C.detach(), data.returns_C, loss.detach())
        try:
            self._grad_norms.append(step(self.engine))
        except NonFiniteError as e:
            raise NonFiniteError(f"the critic: {e}. Lower critic.learning_rate") from None

    def _count(self, values_C: Tensor, returns_C: Tensor, loss: Tensor) -> None:
        error = (values_C - returns_C).square().sum()
        parts = (
            loss.new_full((), len(values_C)),
            loss,
            error,
            values_C.sum(),
            returns_C.sum(),
            returns_C.square().sum(),
        )
        self._sums += torch.stack(parts).double()

    def take_metrics(self) -> dict[str, float]:
        """The metrics of the updates since the last call, over all ranks."""
        dist.all_reduce(self._sums)
        s = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        tokens, steps = max(s["tokens"], 1.0), max(len(self._grad_norms), 1)
        variance = s["return_squared"] / tokens - (s["return"] / tokens) ** 2
        out = {
            "critic/loss": s["loss"] / steps,
            "critic/value": s["value"] / tokens,
            "critic/return": s["return"] / tokens,
            "critic/explained_variance": 1 - s["error"] / tokens / variance if variance > 1e-12 else 0.0,
            "critic/grad_norm": sum(self._grad_norms) / steps,
        }
        self._sums.zero_()
        self._grad_norms = []
        return out
