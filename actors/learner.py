"""One DeepSpeed rank. All ranks get the same batch, make the same plan, and each takes its own micro-batches from it; under
sequence parallelism the ranks that share their micro-batches take the same ones.

    fetch own samples -> [old log-probabilities] -> [reference] -> [KL in the reward: advantages] -> [critic: advantages]
    -> for each mini-batch: micro-batches, then one optimizer step; then, where it is due, the reference takes over the new
    weights

A step of one mini-batch may come in parts, as its groups are finished (`accumulate`); `update` then does what is left.

`old` costs a pass of its own only where the weights move before a sample's turn, for every mini-batch but the first, or
where the advantages are made of it (and for none where the sampler's own report is taken for it). Where top_p, top_k or min_p cut
tokens off, the same pass makes the sets of those that are left, and the reference needs them for the first mini-batch too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import ray
import torch
import torch.distributed as dist

from actors import learner_kl, learner_offload, learner_reference, learner_sequence, learner_state
from actors.learner_critic import Critic
from actors.learner_engine import LearnerSpec, build_engine, build_reference, can_share_prompts, step
from actors.rendezvous import (
    Meeting,
    SealedStore,
    gather_texts,
    listen_at,
    new_key,
    open_store,
    prove_membership,
    refuse_objects,
)
from actors.runtime import LOOPBACK, own_process, use_nodes_interface
from grpo_ray.activity import Activity
from grpo_ray.batching import MiniBatchPlan, PackItem, pack, plan_batch, shared_cost, token_values, tokens_of_version
from grpo_ray.checkpoint_store import Place
from grpo_ray.config import AlgorithmConfig, DpoOptions, RewardModelOptions
from grpo_ray.errors import CheckpointError, LostSamplesError, NonFiniteError, WorkerError
from grpo_ray.flops import ModelShape, UpdatePasses, model_shape, throughput_metrics, update_flops
from grpo_ray.learner_files import SavedLearner
from grpo_ray.lora import adapter_bytes, adapter_checksum, adapters_off
from grpo_ray.losses.aggregation import Normalizers
from grpo_ray.machine import usable_cpus
from grpo_ray.manifest import FileSum
from grpo_ray.objectives import GrpoObjective, MicroBatchData, Objective, SftObjective
from grpo_ray.objectives_pairs import DpoObjective, RewardModelObjective
from grpo_ray.policy import PolicyModel
from grpo_ray.sequence import Alone, SequenceRanks
from grpo_ray.truncation import TokenSets
from grpo_ray.types import Sample, TrainBatch, TrainSample, UpdateReport

if TYPE_CHECKING:
    from actors.adapter_sync import AdapterReport
    from actors.weight_sender import WeightSender
    from actors.weights import EngineTarget, SendReport

FETCH_TIMEOUT_S = 120.0
DISK = "disk"
"""The concurrency group of what goes on beside training."""
P = ParamSpec("P")
R = TypeVar("R")


def _recorded(
    name: str,
) -> Callable[[Callable[Concatenate[LearnerActor, P], R]], Callable[Concatenate[LearnerActor, P], R]]:
    """A method of the actor whose calls are spans of its activity."""

    def decorate(method: Callable[Concatenate[LearnerActor, P], R]) -> Callable[Concatenate[LearnerActor, P], R]:
        @wraps(method)
        def call(self: LearnerActor, *args: P.args, **kwargs: P.kwargs) -> R:
            with self._activity.span(name):
                return method(self, *args, **kwargs)

        return call

    return decorate


@dataclass(frozen=True)
class _Done:
    """A micro-batch that went forward and backward: what is asked of it when the batch is whole."""

    data: MicroBatchData
    batch: TrainBatch
    """Its samples are rows of this one."""
    theta_C: torch.Tensor
    loss: torch.Tensor

    @property
    def is_wrong(self) -> torch.Tensor:
        """0-dim. A clip or a mask hides what a sampler reported: exp(-inf) is 0, and comparisons with NaN are False."""
        return ~(self.loss.isfinite() & self.data.rollout_C.isfinite().all())


@dataclass
class _Pass:
    """What forward and backward of a step have added up so far, on this rank."""

    sums: torch.Tensor
    largest: torch.Tensor
    done: list[_Done] = field(default_factory=list)
    micro_batches: list[MicroBatchData] = field(default_factory=list)
    """Dummies included."""
    samples: set[tuple[str, int]] = field(default_factory=set)
    """(prompt id, index) of those that came in parts."""


class LearnerActor:
    """Lives in its own process, started by `LearnerGroup`: first `rendezvous` on rank 0, then `start` on all."""

    def __init__(self, spec: LearnerSpec, rank: int, num_ranks: int) -> None:
        self.log_path = own_process(spec.run_dir, f"learner-{rank}")
        self.spec = spec
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._algorithm = spec.algorithm or AlgorithmConfig()
        self._objective = _objective(spec)
        self._seconds: dict[str, float] = {}
        self._activity = Activity(f"learner-{rank}")
        self._early: _Pass | None = None
        """Of the step under way, while its batch is not whole."""
        self._store: SealedStore | None = None
        self._ranks: SequenceRanks = Alone()
        """Those that share their micro-batches with this one."""
        self._engine: Any = None
        self._shape: ModelShape | None = None
        self._shares_prompts = False
        self._reference: Any = None
        self._critic: Critic | None = None
        self._sender: WeightSender | None = None
        self._held: learner_state.Held | None = None
        """Of the checkpoint that is about to be written."""

    # Start.

    def node(self) -> str:
        """Ray's id of the node that this rank is on."""
        return str(ray.get_runtime_context().get_node_id())

    def rendezvous(self, on_one_node: bool) -> Meeting:
        """Where the ranks meet, and their key. The port is bound from here on: nobody can take it in between."""
        host = LOOPBACK if on_one_node else ray.util.get_node_ip_address()
        listening = listen_at(host)
        meeting = Meeting(host, listening.getsockname()[1], new_key())
        self._store = open_store(meeting, self._timeout, listening)
        return meeting

    def start(self, meeting: Meeting) -> int:
        """Meet the others, load the model, build the engine. Returns the number of parameters."""
        learner = self.spec.learner
        on_cpu = self.device.type == "cpu"
        one = on_cpu and self.num_ranks > 1
        torch.set_num_threads(learner.num_threads or (1 if one else usable_cpus()))
        torch.manual_seed(self.spec.seed + self.rank)
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": meeting.host,
            "MASTER_PORT": str(meeting.port),
        }
        use_nodes_interface(on_one_node=meeting.host == LOOPBACK)
        refuse_objects()
        # torch keeps only its C++ part alive.
        self._store = self._store or open_store(meeting, self._timeout)
        dist.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            store=self._store,
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=self._timeout,
        )
        prove_membership(dist.group.WORLD, meeting.key, self.rank, self.num_ranks)
        import deepspeed

        # Compiled at first use (18 s and more), for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
        self._ranks = learner_sequence.join(learner.sequence_parallel_size, self._timeout)
        self._engine = build_engine(self.spec, self.device, self._ranks)
        self._shape = model_shape(self._engine.module.hf)
        self._shares_prompts = can_share_prompts(self.spec, self._engine.module.hf)
        if self.spec.needs_reference_model:
            self._reference = build_reference(self.spec, self.device, self._ranks)
        if self.spec.needs_critic:
            self._critic = Critic(self.spec, self.device, self._ranks)
        return sum(getattr(p, "ds_numel", p.numel()) for p in self._engine.module.parameters())

    @property
    def _timeout(self) -> timedelta:
        """Of each collective."""
        return timedelta(seconds=self.spec.collective_timeout_s)

    # Update.

    @_recorded("update")
    def accumulate(self, part: TrainBatch) -> None:
        """Forward and backward of groups that are sure to be in the step's batch, while others are still sampled.

        The gradient is a sum: what is not known before the batch is whole, the normalizers, is a common factor of all of it,
        and `update` multiplies by it.
        """
        if self._early is None:
            self._start_clock()
            self._early = self._new_pass()
        self._early.samples |= {(s.prompt_id, s.index) for s in part.samples}
        for planned in self._plan(part):
            with self._timed("fetch"):
                mini_batch = self._fetch(part, planned, Normalizers.unit(self.spec.max_completion_length))
            self._set_reference([mini_batch], part)
            with self._timed("forward_backward"):
                self._forward_backward(mini_batch, part, self._early)

    @_recorded("update")
    def update(self, batch: TrainBatch) -> UpdateReport:
        """Train on the batch: every pass, every mini-batch; less what `accumulate` has had of it.

        Raises:
            NonFiniteError: on all ranks alike, naming the sample; the weights are as they were before that mini-batch, or before
                the update, if it is a KL.
            ConfigError: a sample is longer than a micro-batch may be.
            WorkerError: samples could not be fetched, or what came in parts is not in the batch.
        """
        started = time.monotonic()
        metrics = self._whole(batch) if self._early is None else self._finish(batch, self._early)
        every = self._algorithm.ref_refresh_steps
        if self._reference is not None and every and (batch.step + 1) % every == 0:
            with self._timed("reference"):
                learner_reference.follow(self._reference_model, self._engine.module, self._algorithm.ref_polyak_tau)
        metrics |= {f"update/{name}_s": seconds for name, seconds in self._seconds.items()}
        metrics |= self._throughput(batch, sum(self._seconds.values()), metrics["tokens/processed"])
        seconds = time.monotonic() - started
        return UpdateReport(step=batch.step, metrics=metrics, seconds=seconds, tracks=(self._activity.finish(),))

    @_recorded("values")
    @torch.no_grad()
    def values(self, batch: TrainBatch) -> list[float]:
        """[S] what the model, as it is, says of each sample: its log-probability, or a reward model's score. All ranks together."""
        values_S = torch.zeros(len(batch.samples), dtype=torch.float64, device=self.device)
        for planned in self._plan(batch):
            for data in self._fetch(batch, planned, Normalizers.unit(self.spec.max_completion_length)):
                theta_C = self._logprobs(self._engine, data, batch.temperature)
                if not data.packed.is_dummy and self._ranks.rank == 0:
                    # Each sample is counted by one rank, so the sum over ranks only spreads its bits.
                    places_C = torch.from_numpy(data.packed.samples).to(self.device)
                    places_S = places_C[data.segments.lengths_S.cumsum(0) - 1]
                    values_S[places_S] = self._objective.value(theta_C, data.segments).double()
        dist.all_reduce(values_S)
        told: list[float] = values_S.tolist()
        return told

    def _finish(self, batch: TrainBatch, early: _Pass) -> dict[str, float]:
        """The rest of a batch that came in parts, and the optimizer step."""
        rest = [s for s in batch.samples if (s.prompt_id, s.index) not in early.samples]
        if len(batch.samples) - len(rest) != len(early.samples):
            raise WorkerError(
                f"step {batch.step + 1}: of {len(early.samples)} samples that came in parts, {len(batch.samples) - len(rest)} are "
                "in the batch; their gradients can't be taken back"
            )
        self.accumulate(replace(batch, samples=rest))
        self._early = None
        self._check_finite(early, batch)
        trained = [s for s in batch.samples if s.loss_mask and s.num_tokens > 0]
        if not trained:
            # As of a batch that came whole: nothing went forward or backward, and there is nothing to take a step by.
            return self._metrics(early, [], [])
        unit = Normalizers.unit(self.spec.max_completion_length)
        factor = self._objective.weight(1, self._normalizers(trained)) / self._objective.weight(1, unit)
        learning_rate = float(self._engine.get_lr()[0])
        with self._timed("step"):
            grad_norm = self._step(batch, factor)
        early.sums *= torch.tensor(
            [factor if name in self._objective.weighted_sums else 1.0 for name in self._objective.sum_names],
            device=self.device,
        )
        return self._metrics(early, [grad_norm], [learning_rate])

    def _whole(self, batch: TrainBatch) -> dict[str, float]:
        self._start_clock()
        kl_in_reward = self._algorithm.kl_in == "reward"
        plan = self._plan(batch)
        untrained = self._plan_untrained(batch) if kl_in_reward else []
        with self._timed("fetch"):
            fetched = [
                self._fetch(batch, planned, self._normalizers([batch.samples[i] for i in planned.samples]))
                for planned in plan + untrained
            ]
            steps = fetched[: len(plan)]
        with self._timed("old"):
            later = fetched if kl_in_reward else steps[1:]
            for data in (data for mini_batch in later for data in mini_batch):
                if self._algorithm.old_logprobs == "recompute":
                    data.old_C = self._logprobs(self._engine, data, batch.temperature)
                elif data.sets is not None:
                    self._logprobs(self._engine, data, batch.temperature)
        self._set_reference(fetched, batch)
        of_the_kl = self._take_kl_off(batch, plan + untrained, fetched) if kl_in_reward else {}
        micro_batches = [data for mini_batch in steps for data in mini_batch]
        if self._critic is not None:
            with self._timed("critic"):
                self._critic.set_advantages(micro_batches)
        total = self._new_pass()
        grad_norms, learning_rates = [], []
        for _ in range(self._algorithm.num_iterations):
            for mini_batch, planned in zip(steps, plan, strict=True):
                with self._timed("forward_backward"):
                    total.done.clear()
                    self._forward_backward(mini_batch, batch, total)
                    self._check_finite(total, batch)
                with self._timed("step"):
                    learning_rates.append(float(self._engine.get_lr()[0]))
                    grad_norms.append(self._step(batch))
                for data in micro_batches:
                    data.moved = True
                if self._critic is not None:
                    with self._timed("critic"):
                        num_tokens = sum(batch.samples[i].num_tokens for i in planned.samples)
                        self._critic.update(mini_batch, num_tokens, self.num_ranks)
        total.micro_batches = micro_batches
        metrics = self._metrics(total, grad_norms, learning_rates) | of_the_kl
        if self._critic is not None:
            metrics |= self._critic.take_metrics()
        return metrics

    def _start_clock(self) -> None:
        self._seconds = dict.fromkeys(("fetch", "old", "reference", "critic", "forward_backward", "step"), 0.0)

    def _new_pass(self) -> _Pass:
        sums = torch.zeros(len(self._objective.sum_names), device=self.device)
        return _Pass(sums, torch.zeros((), device=self.device))

    def _normalizers(self, members: Sequence[TrainSample]) -> Normalizers:
        return Normalizers(
            num_sequences=len(members),
            num_tokens=sum(s.num_tokens for s in members),
            max_completion_length=self.spec.max_completion_length,
        )

    def _set_reference(self, steps: list[list[MicroBatchData]], batch: TrainBatch) -> None:
        if self.spec.needs_reference:
            with self._timed("old"):
                for data in (data for mini_batch in steps for data in mini_batch):
                    if data.sets is not None and not data.sets.made:
                        # They are those of the policy that sampled, for the reference too.
                        self._logprobs(self._engine, data, batch.temperature)
            with self._timed("reference"), self._reference_policy() as reference:
                for data in (data for mini_batch in steps for data in mini_batch):
                    data.ref_C = self._logprobs(reference, data, batch.temperature)

    def _throughput(self, batch: TrainBatch, seconds: float, num_tokens: float) -> dict[str, float]:
        passes = UpdatePasses(
            train=self._algorithm.num_iterations,
            reference=self.spec.needs_reference,
            old=self._algorithm.old_logprobs == "recompute" or batch.truncation.any,
            old_of_first=self._algorithm.kl_in == "reward" or (batch.truncation.any and self.spec.needs_reference),
            critic=self._critic is not None,
        )
        flops = (
            update_flops(self._shape, batch, self._plan(batch), passes, shared_prompts=self._shares_prompts)
            if self._shape
            else None
        )
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return throughput_metrics(flops, num_tokens, seconds, self.num_ranks, device, self.spec.model.dtype)

    def _plan(self, batch: TrainBatch) -> list[MiniBatchPlan]:
        """Over the samples that are trained; the plan's indices point into `batch.samples`."""
        if self._objective.pairs:
            return [self._plan_pairs(batch)]
        trained = [i for i, s in enumerate(batch.samples) if s.loss_mask and s.num_tokens > 0]
        skip = self.spec.learner.skip_no_signal
        idle = {
            n
            for n, i in enumerate(trained)
            if skip and not any(map(self._objective.moves, batch.samples[i].advantages))
        }
        return self._plan_of(trained, batch, self._algorithm.num_mini_batches, idle)

    def _plan_of(
        self, members: list[int], batch: TrainBatch, num_mini_batches: int, idle: Set[int] = frozenset()
    ) -> list[MiniBatchPlan]:
        """Over these samples of the batch; `idle` are places among the members."""
        samples = [batch.samples[i] for i in members]
        plans = plan_batch(
            [s.num_prompt_tokens + s.num_tokens for s in samples],
            [s.group for s in samples],
            num_ranks=self.spec.learner.data_parallel_size,
            num_mini_batches=num_mini_batches,
            micro_batch_tokens=self.spec.learner.micro_batch_tokens,
            padded=not self.spec.learner.packing,
            prompts_S=[s.num_prompt_tokens for s in samples] if self._shares_prompts else None,
            idle=idle,
        )
        return [plan.renumbered(members) for plan in plans]

    def _plan_pairs(self, batch: TrainBatch) -> MiniBatchPlan:
        """One mini-batch of samples that come in pairs; both of a pair are in one micro-batch, side by side."""
        lengths = [s.num_prompt_tokens + s.num_tokens for s in batch.samples]
        both = list(zip(lengths[::2], lengths[1::2], strict=True))
        padded = not self.spec.learner.packing
        prompts = [s.num_prompt_tokens if self._shares_prompts else 0 for s in batch.samples[::2]]
        (plan,) = plan_batch(
            [
                2 * max(pair) if padded else shared_cost(pair, prompt)
                for pair, prompt in zip(both, prompts, strict=True)
            ],
            range(len(both)),
            num_ranks=self.spec.learner.data_parallel_size,
            num_mini_batches=1,
            micro_batch_tokens=self.spec.learner.micro_batch_tokens,
            padded=padded,
        )
        return plan.of_pairs()

    def _plan_untrained(self, batch: TrainBatch) -> list[MiniBatchPlan]:
        """Samples that are out of the loss and in their group's baseline: their KL counts there."""
        if self._algorithm.advantage == "gae":
            return []
        members = [
            i for i, s in enumerate(batch.samples) if not s.loss_mask and s.advantage == s.advantage and s.num_tokens
        ]
        return self._plan_of(members, batch, num_mini_batches=1)

    def _take_kl_off(
        self, batch: TrainBatch, plan: list[MiniBatchPlan], fetched: list[list[MicroBatchData]]
    ) -> dict[str, float]:
        """Make the advantages of rewards less beta x KL; with a critic, leave the KL of the tokens to it. Metrics come back."""
        every = [data for mini_batch in fetched for data in mini_batch]
        kl_S = learner_kl.kl_of_samples(every, batch, self._algorithm, self._ranks, self.device)
        if self._critic is None:
            learner_kl.set_advantages(every, batch, kl_S, self._algorithm)
        num_tokens = [batch.samples[i].num_tokens for mini_batch in plan for i in mini_batch.samples]
        return learner_kl.metrics(num_tokens, kl_S, self._algorithm.beta)

    def _fetch(self, batch: TrainBatch, planned: MiniBatchPlan, normalizers: Normalizers) -> list[MicroBatchData]:
        micros = planned.ranks[self.rank // self._ranks.size]
        refs = list({batch.samples[i].ref: None for micro in micros for i in micro})
        try:
            rows: dict[Any, list[Sample]] = dict(zip(refs, ray.get(refs, timeout=FETCH_TIMEOUT_S), strict=True))
        except ray.exceptions.ObjectLostError as e:
            raise LostSamplesError(
                f"learner-{self.rank} can't have samples of step {batch.step}, whose node died: {e}"
            ) from None
        except ray.exceptions.RayError as e:
            raise WorkerError(
                f"learner-{self.rank} can't fetch samples of step {batch.step} from the object store: {e}"
            ) from None
        packed = (
            pack(
                [self._item(batch, i, rows, normalizers) for i in micro],
                padded=not self.spec.learner.packing,
                share_prompts=self._shares_prompts,
            )
            for micro in micros
        )
        made = [MicroBatchData.of(p, self.device) for p in packed]
        if batch.truncation.any:
            for data in made:
                data.sets = TokenSets(batch.truncation)
        return made

    def _item(self, batch: TrainBatch, index: int, rows: dict[Any, list[Sample]], normalizers: Normalizers) -> PackItem:
        info = batch.samples[index]
        sample = rows[info.ref][info.row]
        if (sample.prompt_id, sample.index, len(sample.token_ids)) != (info.prompt_id, info.index, info.num_tokens):
            raise WorkerError(
                f"sample {info.prompt_id}[{info.index}] of step {batch.step} is not what its reference holds: "
                f"{sample.prompt_id}[{sample.index}] with {len(sample.token_ids)} tokens instead of {info.num_tokens}"
            )
        return PackItem(
            prompt_ids=sample.prompt_token_ids,
            completion_ids=sample.token_ids,
            rollout_logprobs=sample.logprobs,
            advantage=token_values(info.steps, info.num_tokens) if info.steps else info.advantage,
            weight=self._objective.weight(info.num_tokens, normalizers),
            sample=index,
            current=tokens_of_version(sample.versions, batch.step, info.num_tokens),
        )

    @contextmanager
    def _reference_policy(self) -> Iterator[Any]:
        if self._reference is not None:
            yield self._reference
            return
        with adapters_off(self._engine.module.hf):
            yield self._engine

    @torch.no_grad()
    def _logprobs(self, model: Any, data: MicroBatchData, temperature: float) -> torch.Tensor:
        logp_C: torch.Tensor = model(*_inputs(data, temperature))[0]
        return logp_C

    def _forward_backward(self, mini_batch: list[MicroBatchData], batch: TrainBatch, into: _Pass) -> None:
        for data in mini_batch:
            theta_C, entropy_C = self._engine(*_inputs(data, batch.temperature))
            loss, new_sums, new_largest = self._objective.loss(data, theta_C, entropy_C)
            # DeepSpeed averages gradients over all ranks; the weights in the loss already hold the global normalizer, and a
            # rank's gradient is that of its own slice.
            self._engine.backward(loss * self.num_ranks, scale_wrt_gas=False)
            if self._algorithm.num_iterations == 1:
                data.sets = None
            into.micro_batches.append(data)
            if not data.packed.is_dummy:
                into.sums += new_sums
                into.largest = torch.maximum(into.largest, new_largest)
                into.done.append(_Done(data, batch, theta_C.detach(), loss.detach()))

    def _check_finite(self, done: _Pass, batch: TrainBatch) -> None:
        """Before the step, all ranks agree whether every loss, and what samplers reported, is a number."""
        wrong = torch.stack([d.is_wrong for d in done.done]).any() if done.done else torch.tensor(False)
        flag = wrong.to(device=self.device, dtype=torch.float32).reshape(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() == 0:
            return
        names = gather_texts(self._culprit(done.done) or "", self.device)
        self._discard_gradients()
        culprit = next(n for n in names if n)
        raise NonFiniteError(
            f"step {batch.step + 1}: the {culprit} is not a finite number; the weights were left as they "
            "are. Lower learner.learning_rate, or look at this sample"
        )

    @staticmethod
    def _culprit(done: list[_Done]) -> str | None:
        for d in done:
            if d.is_wrong:
                reported = d.data.rollout_C.isfinite()
                tokens = ~(d.theta_C.isfinite() & reported & d.data.advantages_C.isfinite())
                sample = d.batch.samples[int(d.data.packed.samples[int(tokens.int().argmax())])]
                what = "loss" if reported.all() else "log-probability that came with a token"
                return f"{what} of sample {sample.prompt_id}[{sample.index}]"
        return None

    def _discard_gradients(self) -> None:
        """DeepSpeed's optimizers drop gradients that are not finite, and skip the step."""
        if self.spec.learner.zero_stage == 0:
            self._engine.zero_grad()
        else:
            self._engine.step()

    def _step(self, batch: TrainBatch, factor: float = 1.0) -> float:
        try:
            return step(self._engine, factor)
        except NonFiniteError as e:
            raise NonFiniteError(
                f"step {batch.step + 1}: {e}, though every loss is finite. Lower learner.learning_rate"
            ) from None

    def _metrics(self, total: _Pass, grad_norms: list[float], learning_rates: list[float]) -> dict[str, float]:
        own = [data.packed for data in total.micro_batches]
        inputs = float(sum(p.num_inputs for p in own))
        counts = [
            float(sum(len(p.targets) for p in own if not p.is_dummy)),
            float(sum(p.num_tokens for p in own)),
            inputs,
            float(sum(p.is_dummy for p in own)),
        ]
        totals = torch.cat([total.sums.double(), torch.tensor(counts, dtype=torch.float64, device=self.device)])
        if self._ranks.rank > 0:
            # What ranks share, the first of them counts.
            totals.zero_()
        highest = torch.stack([total.largest.double(), torch.tensor(inputs, dtype=torch.float64, device=self.device)])
        dist.all_reduce(totals)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        *reduced, trained, processed, all_inputs, dummies = totals.tolist()
        largest_mismatch, most_inputs = highest.tolist()
        num_steps = max(len(grad_norms), 1)
        named = dict(zip(self._objective.sum_names, reduced, strict=True))
        return {
            **self._objective.metrics(named, largest_mismatch, num_steps),
            "grad_norm": sum(grad_norms) / num_steps,
            "lr": learning_rates[-1] if learning_rates else float(self._engine.get_lr()[0]),
            "update/num_steps": float(len(grad_norms)),
            "update/micro_batches": float(len(own)),
            "update/dummies": dummies,
            "update/imbalance": most_inputs * self.spec.learner.data_parallel_size / max(all_inputs, 1.0),
            "tokens/trained": trained,
            "tokens/processed": processed,
            "tokens/shared": processed - all_inputs,
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self._activity.span(name):
            yield
        self._seconds[name] += time.monotonic() - started

    # Checkpoints. See actors/learner_state.py for what can go wrong.

    @_recorded("hold")
    def hold(self, place: Place, *, export: bool) -> None:
        """Copy into memory what `write` will write; all ranks together. What was held before is forgotten."""
        self._held = None
        learner_state.check_room(self._engine, self.spec, place)
        models = {"policy": learner_state.hold_engine(self._engine)}
        if self._critic is not None:
            models["critic"] = learner_state.hold_engine(self._critic.engine)
        if self.spec.saves_reference:
            models["reference"] = learner_reference.hold(self._reference_model)
        exported = learner_state.hold_export(self._engine, self.spec) if export else None
        self._held = learner_state.Held(models, learner_state.hold_random_state(), exported)

    @ray.method(concurrency_group=DISK)
    def write(self, place: Place) -> dict[str, FileSum]:
        """In a thread beside the one that trains."""
        held, self._held = self._held, None
        if held is None:
            raise WorkerError(f"learner-{self.rank} was asked to write a checkpoint and holds nothing of one")
        return learner_state.write(held, self.spec, place, self.rank, self.num_ranks)

    @_recorded("load")
    def load(self, place: Place) -> None:
        with place.reading() as files:
            saved = SavedLearner.open(files)
            learner_state.check_saved(saved, self.spec, place)
            learner_state.load_engine(self._engine, saved, "policy")
            if self._critic is not None:
                learner_state.load_engine(self._critic.engine, saved, "critic")
            if self.spec.saves_reference:
                if not saved.has("reference"):
                    raise CheckpointError(
                        f"{place.url} holds no reference: it was saved with algorithm.ref_refresh_steps 0, set that back"
                    )
                learner_reference.load(self._reference_model, saved.reader("reference"))
            learner_state.load_random_state(saved, self.rank)

    @property
    def _reference_model(self) -> PolicyModel:
        model: PolicyModel = self._reference.module if self.spec.learner.zero_stage == 3 else self._reference
        return model

    # Turns with a sampler on the same device.

    @_recorded("offload")
    def offload(self, keep_weights: bool) -> None:
        """Give the device's memory back, but for the weights if they are to be sent."""
        learner_offload.offload(self._engine, self.device, keep_weights=keep_weights)
        if self._critic is not None:
            learner_offload.offload(self._critic.engine, self.device, keep_weights=False)
        if self._reference is not None:
            learner_offload.move_model(self._reference_model, torch.device("cpu"))

    @_recorded("reload")
    def reload(self) -> None:
        """Take it back."""
        learner_offload.reload(self._engine, self.device)
        if self._critic is not None:
            learner_offload.reload(self._critic.engine, self.device)
        if self._reference is not None:
            learner_offload.move_model(self._reference_model, self.device)

    # Weights.

    def prepare_weights(self) -> None:
        """Import what sends weights, vLLM with it: seconds that the first sync would spend while the engines are paused."""
        from actors import weight_sender  # noqa: F401

    @_recorded("connect")
    def weights_connect(self, targets: list[EngineTarget], generation: int) -> None:
        if self._sender is None:
            self._sender = self._make_sender()
        self._sender.connect(targets, generation)

    @_recorded("weights")
    def weights_send(self, version: int) -> SendReport:
        if self._sender is None:
            raise WorkerError(f"learner-{self.rank} was asked to send weights before it was connected to any engine")
        report = self._sender.send(version)
        return {**report, "tracks": [self._activity.finish()]}

    def put_adapter(self) -> AdapterReport | None:
        """Rank 0 puts the adapter as it is now into the object store; the others take part in gathering and return None."""
        from actors.adapter_sync import AdapterReport

        tensors = learner_state.gather_adapter(self._engine)
        if self.rank != 0:
            return None
        data = adapter_bytes(tensors)
        return AdapterReport(ref=ray.put(data), num_bytes=len(data), checksum=adapter_checksum(data))

    def _make_sender(self) -> WeightSender:
        # Imported here: it brings vLLM with it, which takes seconds that a run without samplers need not spend.
        from actors.weight_sender import WeightSender, ZeroWeightSource

        assert self.spec.weights is not None
        bucket_bytes = self.spec.weights.bucket_mb << 20
        source = ZeroWeightSource(self._engine.module.hf, bucket_bytes, self.spec.dtype)
        return WeightSender(source, self.rank, self.spec.weights_backend, bucket_bytes, self.spec.sync_timeout_s)


def _inputs(data: MicroBatchData, temperature: float) -> tuple[Any, ...]:
    """Of a model's forward."""
    return (data.packed, temperature) if data.sets is None else (data.packed, temperature, data.sets)


def _objective(spec: LearnerSpec) -> Objective:
    match spec.preferences:
        case DpoOptions() as options:
            return DpoObjective(options)
        case RewardModelOptions() as options:
            return RewardModelObjective(options)
    return SftObjective() if spec.algorithm is None else GrpoObjective(spec.algorithm)
