"""Gradient accumulation on one rank: micro-batches go forward and backward, all ranks agree that every loss is finite, then the
optimizer takes its step; and the metrics of what was accumulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from actors.learner.build import LearnerSpec, step
from actors.learner.micro_batches import model_inputs
from actors.rendezvous import gather_texts
from grpo_ray.algorithm.objectives import MicroBatchData, Objective
from grpo_ray.batch.sequence import SequenceRanks
from grpo_ray.errors import NonFiniteError, WorkerError
from grpo_ray.models.features.routing import RoutingSums
from grpo_ray.types import TrainBatch, TrainSample


class Accumulation:
    """What one update accumulates: gradients in the engine; sums for metrics, and what the finite check reads, here. An update has
    several optimizer steps, or one for several parts of a batch."""

    def __init__(
        self, spec: LearnerSpec, engine: Any, objective: Objective, ranks: SequenceRanks, device: torch.device
    ) -> None:
        self._spec = spec
        self._engine = engine
        self._objective = objective
        self._ranks = ranks
        self._device = device
        self._keeps_sets = spec.algorithm is not None and spec.algorithm.num_iterations > 1
        self._sums = torch.zeros(len(objective.sum_names), device=device)
        self._largest_mismatch = torch.zeros((), device=device)
        self._unchecked: list[_Computed] = []
        """The micro-batches since the last optimizer step."""
        self._micro_batches: dict[int, MicroBatchData] = {}
        """Identity -> micro-batch: each counts once, however often it is trained on. Dummies are included."""
        self._routing = RoutingSums(engine.module.routing, device)
        self._grad_norms: list[float] = []
        self._learning_rates: list[float] = []
        self._parts: set[tuple[str, int]] = set()
        """(prompt id, index) of each sample that arrived in a part."""

    def add_part(self, part: TrainBatch) -> None:
        """Record that these samples need not be trained again."""
        self._parts |= {(s.prompt_id, s.index) for s in part.samples}

    def rest(self, batch: TrainBatch) -> list[TrainSample]:
        """The samples of the batch that did not arrive in parts.

        Raises:
            WorkerError: a sample that arrived in a part is not in the batch.
        """
        rest = [s for s in batch.samples if (s.prompt_id, s.index) not in self._parts]
        if len(batch.samples) - len(rest) != len(self._parts):
            raise WorkerError(
                f"step {batch.step}: of {len(self._parts)} samples that came in parts, "
                f"{len(batch.samples) - len(rest)} are in the batch; their gradients can't be taken back"
            )
        return rest

    def forward_backward(self, mini_batch: Sequence[MicroBatchData], batch: TrainBatch) -> None:
        for data in mini_batch:
            logps_C, entropy_C = self._engine(*model_inputs(data, batch.temperature, self._objective.slopes(data)))
            loss, sums, largest_mismatch = self._objective.loss(data, logps_C, entropy_C)
            # DeepSpeed averages gradients over all ranks; the weights in the loss already hold the global normalizer, and a
            # rank's gradient is that of its own slice.
            self._engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)
            self._routing.add()
            if not self._keeps_sets:
                data.sets = None
            self._micro_batches[id(data)] = data
            if not data.packed.is_dummy:
                self._sums += sums
                self._largest_mismatch = torch.maximum(self._largest_mismatch, largest_mismatch)
                self._unchecked.append(_Computed(data, batch, logps_C.detach(), loss.detach()))

    def check_finite(self, batch: TrainBatch) -> None:
        """Make all ranks agree, before the step, whether every loss and every rollout logprob is a finite number.

        Raises:
            NonFiniteError: on all ranks alike, naming the sample.
        """
        computed, self._unchecked = self._unchecked, []
        wrong = torch.stack([c.is_wrong for c in computed]).any() if computed else torch.tensor(False)
        flag = wrong.to(device=self._device, dtype=torch.float32).reshape(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() == 0:
            return
        names = gather_texts(next((c.culprit for c in computed if c.is_wrong), ""), self._device)
        self._discard_gradients()
        culprit = next(n for n in names if n)
        raise NonFiniteError(
            f"step {batch.step}: the {culprit} is not a finite number; the weights were left as they "
            "are. Lower learner.learning_rate, or look at this sample"
        )

    def step(self, batch: TrainBatch, factor: float = 1.0) -> None:
        """Take one optimizer step.

        Args:
            factor: the accumulated gradient is multiplied by this.

        Raises:
            NonFiniteError: the gradient is not finite; the weights are unchanged.
        """
        learning_rate = float(self._engine.get_lr()[0])
        try:
            self._grad_norms.append(step(self._engine, factor))
        except NonFiniteError as e:
            raise NonFiniteError(
                f"step {batch.step}: {e}, though every loss is finite. Lower learner.learning_rate"
            ) from None
        self._learning_rates.append(learning_rate)
        self._routing.scale(factor)
        if factor != 1.0:
            weighted = self._objective.weighted_sums
            self._sums *= torch.tensor(
                [factor if name in weighted else 1.0 for name in self._objective.sum_names], device=self._device
            )

    def metrics(self) -> dict[str, float]:
        """Metrics over all ranks, which call this together."""
        own = [data.packed for data in self._micro_batches.values()]
        inputs = float(sum(p.num_inputs for p in own))
        counts = [
            float(sum(len(p.targets) for p in own if not p.is_dummy)),
            float(sum(p.num_tokens for p in own)),
            inputs,
            float(sum(p.is_dummy for p in own)),
        ]
        totals = torch.cat([self._sums.double(), torch.tensor(counts, dtype=torch.float64, device=self._device)])
        if self._ranks.rank > 0:
            # What ranks share counts on the first of them.
            totals.zero_()
        highest = torch.stack(
            [self._largest_mismatch.double(), torch.tensor(inputs, dtype=torch.float64, device=self._device)]
        )
        dist.all_reduce(totals)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        routed = self._routing.totals
        dist.all_reduce(routed)
        *reduced, trained, processed, all_inputs, dummies = totals.tolist()
        largest_mismatch, most_inputs = highest.tolist()
        num_steps = max(len(self._grad_norms), 1)
        named = dict(zip(self._objective.sum_names, reduced, strict=True))
        return {
            **self._objective.metrics(named, largest_mismatch, num_steps),
            **self._routing.metrics(routed, num_steps),
            "grad_norm": sum(self._grad_norms) / num_steps,
            "lr": self._learning_rates[-1] if self._learning_rates else float(self._engine.get_lr()[0]),
            "update/num_steps": float(len(self._grad_norms)),
            "update/micro_batches": float(len(own)),
            "update/dummies": dummies,
            "update/imbalance": most_inputs * self._spec.learner.data_parallel_size / max(all_inputs, 1.0),
            "tokens/trained": trained,
            "tokens/processed": processed,
            "tokens/shared": processed - all_inputs,
        }

    def _discard_gradients(self) -> None:
        """Drop the gradients: DeepSpeed's optimizers drop those that are not finite, and skip the step."""
        if self._spec.learner.zero_stage == 0:
            self._engine.zero_grad()
        else:
            self._engine.step()


@dataclass(frozen=True)
class _Computed:
    """What the finite check reads of a micro-batch that went forward and backward."""

    data: MicroBatchData
    batch: TrainBatch
    """The batch whose samples it holds."""
    logps_C: torch.Tensor
    loss: torch.Tensor

    @property
    def is_wrong(self) -> torch.Tensor:
        """Whether anything is not finite, as a 0-dim bool. A clip or a mask hides a rollout logprob: exp(-inf) is 0, and
        comparisons with NaN are False."""
        return ~(self.loss.isfinite() & self._reported_C.all())

    @property
    def _reported_C(self) -> torch.Tensor:
        """Whether the log-probabilities that came with a token, or with its whole completion, are finite."""
        finite_C = self.data.rollout_logps_C.isfinite()
        if self.data.ref_logps_S is None:
            return finite_C
        return finite_C & self.data.segments.spread(self.data.ref_logps_S.isfinite())

    @property
    def culprit(self) -> str:
        """A sample that is not finite, and which of its values."""
        data, reported_C = self.data, self._reported_C
        finite_C = self.logps_C.isfinite() & reported_C & data.advantages_C.isfinite()
        if data.targets_S is not None:
            finite_C &= data.segments.spread(data.targets_S.isfinite())
        sample = self.batch.samples[int(data.packed.samples[int((~finite_C).int().argmax())])]
        what = "loss" if reported_C.all() else "log-probability that came with a token"
        return f"{what} of sample {sample.prompt_id}[{sample.index}]"
