"""Forward passes before training: old_logps of the current policy, and ref_logps of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from actors.learner.build import LearnerSpec
from actors.learner.micro_batches import model_inputs
from actors.learner.timer import UpdateTimer
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.config.schema import AlgorithmConfig
from grpo_ray.models.flops import UpdatePasses
from grpo_ray.models.lora import adapters_off
from grpo_ray.types import TrainBatch


class LogprobPasses:
    """Forward passes without gradients over this rank's micro-batches."""

    def __init__(self, spec: LearnerSpec, engine: Any, reference: Any, timer: UpdateTimer) -> None:
        """
        Args:
            reference: the frozen model; None: the reference is the policy without its adapters, where one is needed.
        """
        self._needs_reference = spec.needs_reference
        self._recomputes_old = (spec.algorithm or AlgorithmConfig()).old_logprobs == "recompute"
        self._engine = engine
        self._reference = reference
        self._timer = timer

    def set_old(self, mini_batches: Sequence[Sequence[MicroBatchData]], batch: TrainBatch) -> None:
        """Fill in `old_logps_C`, unless rollout_logps stand in for them; compute the sets of tokens that are left where top_p,
        top_k or min_p cut some off."""
        with self._timer.phase("old"):
            for data in chain.from_iterable(mini_batches):
                if self._recomputes_old:
                    data.old_logps_C = self.policy_logprobs(data, batch.temperature)
                elif data.sets is not None:
                    self.policy_logprobs(data, batch.temperature)

    def set_reference(self, mini_batches: Sequence[Sequence[MicroBatchData]], batch: TrainBatch) -> None:
        """Fill in `ref_logps_C`, where the loss or the reward has a KL."""
        if not self._needs_reference:
            return
        with self._timer.phase("old"):
            for data in chain.from_iterable(mini_batches):
                if data.sets is not None and not data.sets.made:
                    # The sets are those of the policy that sampled, for the reference too.
                    self.policy_logprobs(data, batch.temperature)
        with self._timer.phase("reference"), self._reference_policy() as reference:
            for data in chain.from_iterable(mini_batches):
                # The reference is the model that it was: it routes by itself.
                by_itself = replace(data, packed=replace(data.packed, routes=None))
                data.ref_logps_C = _logprobs(reference, by_itself, batch.temperature)

    def policy_logprobs(self, data: MicroBatchData, temperature: float) -> torch.Tensor:
        """[C] log-probabilities of the current policy; scores, if it is a reward model."""
        return _logprobs(self._engine, data, temperature)

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        if self._reference is not None:
            yield self._reference
            return
        with adapters_off(self._engine.module.hf):
            yield self._engine


@torch.no_grad()
def _logprobs(model: Any, data: MicroBatchData, temperature: float) -> torch.Tensor:
    logps_C: torch.Tensor = model(*model_inputs(data, temperature))[0]
    return logps_C


def update_passes(spec: LearnerSpec, batch: TrainBatch) -> UpdatePasses:
    """The passes of an update over its batch, for its FLOPs."""
    algorithm = spec.algorithm or AlgorithmConfig()
    return UpdatePasses(
        train=algorithm.num_iterations,
        reference=spec.needs_reference,
        old=algorithm.old_logprobs == "recompute" or batch.truncation.any,
        old_of_first=algorithm.kl_in == "reward" or (batch.truncation.any and spec.needs_reference),
        critic=spec.needs_critic,
    )


def kl_only_passes(spec: LearnerSpec, batch: TrainBatch) -> UpdatePasses:
    """The passes over samples that are out of the loss, and whose KL counts in the baseline of their group."""
    return replace(update_passes(spec, batch), train=0, critic=False)
