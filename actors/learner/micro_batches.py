"""A batch -> this rank's micro-batches: planned identically on all ranks, fetched from the object store, packed.

plan    which samples make which mini-batch (optimizer step), and which micro-batches each rank computes of it
fetch   this rank's samples of one mini-batch, as packed micro-batches on its device
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from actors.learner.build import LearnerSpec
from grpo_ray.algorithm.losses.aggregation import Normalizers, weights_of_sequences
from grpo_ray.algorithm.objectives import MicroBatchData, Objective
from grpo_ray.batch.pack import PackedBatch, PackItem, pack, sampled_tokens, token_values, tokens_of_version
from grpo_ray.batch.plan import MiniBatchPlan, plan_batch, shared_cost
from grpo_ray.batch.sequence import SequenceRanks
from grpo_ray.batch.slopes import Slopes
from grpo_ray.batch.truncation import TokenSets
from grpo_ray.errors import LostSamplesError, WorkerError
from grpo_ray.models.features.routing import Routing
from grpo_ray.types import Sample, TrainBatch, TrainSample

FETCH_TIMEOUT_S = 120.0


def is_trained(sample: TrainSample) -> bool:
    """Whether the sample is in the loss."""
    return sample.loss_mask and sample.num_sampled > 0


class MicroBatchLoader:
    """Plans and fetches the micro-batches of one rank. Ranks that share micro-batches (`ranks`) load the same."""

    def __init__(
        self,
        spec: LearnerSpec,
        objective: Objective,
        rank: int,
        ranks: SequenceRanks,
        device: torch.device,
        *,
        share_prompts: bool,
    ) -> None:
        self._spec = spec
        self._objective = objective
        self._rank = rank
        self._ranks = ranks
        self._device = device
        self._padded = spec.is_plain or not spec.learner.packing
        self.share_prompts = share_prompts
        self.unit = Normalizers.unit(spec.max_completion_length)
        """The normalizers for a part of a batch, while those of the whole are unknown."""

    def plan(self, batch: TrainBatch) -> list[MiniBatchPlan]:
        """Plan the samples that are trained; the plan's indices point into `batch.samples`.

        Raises:
            ConfigError: a sample is longer than a micro-batch may be.
        """
        if self._objective.pairs:
            return [self._plan_pairs(batch)]
        trained = [i for i, s in enumerate(batch.samples) if is_trained(s)]
        idle = {n for n, i in enumerate(trained) if self._is_idle(batch.samples[i])}
        num_mini_batches = self._spec.algorithm.num_mini_batches if self._spec.algorithm else 1
        return self._plan_of(trained, batch, num_mini_batches, idle)

    def plan_kl_only(self, batch: TrainBatch) -> list[MiniBatchPlan]:
        """Plan the samples that count in their group's baseline alone, where the KL in the reward includes theirs."""
        if self._spec.needs_critic:
            return []
        members = [i for i, s in enumerate(batch.samples) if not s.loss_mask and s.reward == s.reward and s.num_sampled]
        return self._plan_of(members, batch, num_mini_batches=1)

    def _is_idle(self, sample: TrainSample) -> bool:
        learner = self._spec.learner
        skips = learner.skip_no_signal and not learner.router_aux_loss_coef
        return skips and not any(map(self._objective.has_gradient, sample.advantages))

    def _plan_of(
        self, members: list[int], batch: TrainBatch, num_mini_batches: int, idle: Set[int] = frozenset()
    ) -> list[MiniBatchPlan]:
        """Plan these samples of the batch; `idle` are indices into `members`."""
        samples = [batch.samples[i] for i in members]
        plans = plan_batch(
            [s.num_prompt_tokens + s.num_tokens for s in samples],
            [s.group for s in samples],
            num_ranks=self._spec.learner.data_parallel_size,
            num_mini_batches=num_mini_batches,
            micro_batch_tokens=self._spec.learner.micro_batch_tokens,
            padded=self._padded,
            prompts_S=[s.num_prompt_tokens for s in samples] if self.share_prompts else None,
            idle=idle,
        )
        return [plan.renumbered(members) for plan in plans]

    def _plan_pairs(self, batch: TrainBatch) -> MiniBatchPlan:
        """Plan one mini-batch of samples that come in pairs; both of a pair are in one micro-batch, side by side."""
        lengths = [s.num_prompt_tokens + s.num_tokens for s in batch.samples]
        both = list(zip(lengths[::2], lengths[1::2], strict=True))
        prompts = [s.num_prompt_tokens if self.share_prompts else 0 for s in batch.samples[::2]]
        (plan,) = plan_batch(
            [
                2 * max(pair) if self._padded else shared_cost(pair, prompt)
                for pair, prompt in zip(both, prompts, strict=True)
            ],
            range(len(both)),
            num_ranks=self._spec.learner.data_parallel_size,
            num_mini_batches=1,
            micro_batch_tokens=self._spec.learner.micro_batch_tokens,
            padded=self._padded,
        )
        return plan.of_pairs()

    def normalizers(self, members: Sequence[TrainSample]) -> Normalizers:
        """Normalizers of an optimizer step over these samples."""
        return Normalizers(
            num_sequences=len(members),
            num_tokens=sum(s.num_sampled for s in members),
            max_completion_length=self._spec.max_completion_length,
        )

    def fetch(self, batch: TrainBatch, planned: MiniBatchPlan, normalizers: Normalizers) -> list[MicroBatchData]:
        """Fetch and pack this rank's micro-batches of a mini-batch.

        Raises:
            LostSamplesError: the node that held samples died.
            WorkerError: samples can't be fetched, or differ from what the batch states.
        """
        micros = planned.ranks[self._rank // self._ranks.size]
        rows = self._fetch_rows(batch, micros)
        made = []
        for micro in micros:
            packed = pack(
                [self._item(batch, i, rows, normalizers) for i in micro],
                padded=self._padded,
                share_prompts=self.share_prompts,
            )
            data = MicroBatchData.of(packed, self._device, [batch.samples[i] for i in micro])
            if batch.truncation.any:
                data.sets = TokenSets(batch.truncation)
            made.append(data)
        return made

    def _fetch_rows(self, batch: TrainBatch, micros: Sequence[Sequence[int]]) -> dict[Any, list[Sample]]:
        """Reference -> the list of samples behind it."""
        refs = list({batch.samples[i].ref: None for micro in micros for i in micro})
        try:
            return dict(zip(refs, ray.get(refs, timeout=FETCH_TIMEOUT_S), strict=True))
        except ray.exceptions.ObjectLostError as e:
            raise LostSamplesError(
                f"learner-{self._rank} can't have samples of step {batch.step}, whose node died: {e}"
            ) from None
        except ray.exceptions.RayError as e:
            raise WorkerError(
                f"learner-{self._rank} can't fetch samples of step {batch.step} from the object store: {e}"
            ) from None

    def _item(self, batch: TrainBatch, index: int, rows: dict[Any, list[Sample]], normalizers: Normalizers) -> PackItem:
        info = batch.samples[index]
        sample = rows[info.ref][info.row]
        held = (sample.prompt_id, sample.index, len(sample.token_ids), sample.num_sampled)
        if held != (info.prompt_id, info.index, info.num_tokens, info.num_sampled):
            raise WorkerError(
                f"sample {info.prompt_id}[{info.index}] of step {batch.step} is not what its reference holds: "
                f"{sample.prompt_id}[{sample.index}] with {held[2]} tokens, {held[3]} of them sampled, instead of "
                f"{info.num_tokens} and {info.num_sampled}"
            )
        if self._spec.keep_routing and sample.routes is None:
            raise WorkerError(
                f"sample {info.prompt_id}[{info.index}] of step {batch.step} came without the experts that its tokens took "
                "(rollout.keep_routing): was it sampled before that was set?"
            )
        return PackItem(
            prompt_ids=sample.prompt_token_ids,
            completion_ids=sample.token_ids,
            rollout_logprobs=sample.logprobs,
            advantage=_advantages(info),
            weight=self._objective.weight(info.num_sampled, normalizers),
            sample=index,
            current=tokens_of_version(sample.versions, batch.version, info.num_tokens),
            routes=sample.routes if self._spec.keep_routing else None,
            sampled=sampled_tokens(sample.versions, info.num_tokens) if info.num_environment_tokens else None,
        )


def balance(
    routing: Routing | None, spec: LearnerSpec, objective: Objective, unit: Normalizers, num_ranks: int
) -> None:
    """Set the load-balancing loss of a model's routers, if it has any."""
    if routing is not None:
        # The learner averages gradients over ranks, and this one enters after the loss was multiplied by their number.
        routing.coef, routing.scale = spec.learner.router_aux_loss_coef, float(num_ranks)
        routing.weigh = partial(_sequence_weights, objective.weight, unit)


def _sequence_weights(
    weight: Callable[[int, Normalizers], float], unit: Normalizers, packed: PackedBatch
) -> NDArray[np.float32]:
    """[S] see `weights_of_sequences`."""
    lengths_S = np.bincount(packed.segments)
    return weights_of_sequences(weight, packed.weights[lengths_S.cumsum() - 1], lengths_S, unit)


def _advantages(sample: TrainSample) -> float | NDArray[np.float64]:
    """Its advantage, or that of each token; NaN if the learner is still to compute it."""
    if sample.steps:
        return token_values(sample.steps, sample.num_tokens)
    return math.nan if sample.advantage is None else sample.advantage


def model_inputs(data: MicroBatchData, temperature: float, slopes: Slopes | None = None) -> tuple[Any, ...]:
    """The arguments of a model's forward."""
    if slopes is not None:
        return data.packed, temperature, data.sets, slopes
    return (data.packed, temperature) if data.sets is None else (data.packed, temperature, data.sets)
