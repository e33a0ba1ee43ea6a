"""One DeepSpeed rank. All ranks get the same batch, make the same plan, and each takes its own micro-batches from it; under
sequence parallelism the ranks that share their micro-batches take the same ones.

    fetch own samples -> [old log-probabilities] -> [reference] -> [KL in the reward: advantages] -> [critic: advantages]
    -> for each mini-batch: micro-batches, then one optimizer step; then, where it is due, the reference takes over the new
    weights

A step of one mini-batch may arrive in parts, as its groups are finished (`accumulate`); `update` then does the rest.

old_logps cost a pass of their own only where the weights move before a sample's turn, for every mini-batch but the first, or
where the advantages depend on them (and for none where rollout_logps stand in for them). Where top_p, top_k or min_p cut
tokens off, the same pass computes the sets of those left, which the reference needs for the first mini-batch too.
"""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

import ray
import torch
import torch.distributed as dist

from actors.devices import given_gpus
from actors.learner import kl, reference, sequence
from actors.learner import state as learner_state
from actors.learner.accumulation import Accumulation
from actors.learner.build import LearnerSpec, build_engine, build_objective, build_reference, can_share_prompts
from actors.learner.critic import Critic
from actors.learner.forward import choose_forward, settle_forward
from actors.learner.logprobs import LogprobPasses, kl_only_passes, update_passes
from actors.learner.micro_batches import MicroBatchLoader, balance, is_trained
from actors.learner.offload import HostMemory, offload, weights
from actors.learner.process_group import join_process_group
from actors.learner.timer import UpdateTimer, traced
from actors.rendezvous import Meeting, SealedStore, listen_at, new_key, open_store
from actors.runtime import LOOPBACK, end_of_imports, own_process
from grpo_ray.algorithm.objectives import MicroBatchData
from grpo_ray.batch.plan import MiniBatchPlan
from grpo_ray.batch.sequence import Alone, SequenceRanks
from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.errors import WorkerError
from grpo_ray.machine import usable_cpus
from grpo_ray.models.flops import FlopCounter, model_shape, throughput_metrics
from grpo_ray.models.lora import adapter_bytes, adapter_checksum
from grpo_ray.models.policy import PolicyModel
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.learner_files import SavedLearner
from grpo_ray.run.manifest import FileSum
from grpo_ray.telemetry.activity import Activity
from grpo_ray.types import TrainBatch, UpdateReport

if TYPE_CHECKING:
    from actors.weights.adapter_sync import AdapterReport
    from actors.weights.protocol import EngineTarget, SendReport
    from actors.weights.sender import WeightSender

DISK = "disk"
"""The concurrency group of calls that run beside training."""


class LearnerActor:
    """A learner rank in its own process, started by `LearnerGroup`: first `rendezvous` on rank 0, then `start` on all."""

    def __init__(self, spec: LearnerSpec, rank: int, num_ranks: int) -> None:
        own_process(spec.run_dir, f"learner-{rank}")
        self.spec = spec
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = torch.device("cuda", 0) if given_gpus() else torch.device("cpu")
        self.activity = Activity(f"learner-{rank}")
        self._timer = UpdateTimer(self.activity)
        self._early: Accumulation | None = None
        """The accumulation of the step in progress, while its batch is incomplete."""
        self._store: SealedStore | None = None
        self._ranks: SequenceRanks = Alone()
        """The ranks that share their micro-batches with this one."""
        self._engine: Any = None
        self._reference: Any = None
        self._critic: Critic | None = None
        self._sender: WeightSender | None = None
        self._host_memory = HostMemory(self.device)
        self._held: learner_state.LearnerSnapshot | None = None
        """The snapshot of the checkpoint that is about to be written."""

    # Start.

    def node(self) -> str:
        """Ray's id of the node that this rank is on."""
        return str(ray.get_runtime_context().get_node_id())

    def rendezvous(self, on_one_node: bool) -> Meeting:
        """Where the ranks meet, and their key. The port is bound from here on, so that no other process can take it meanwhile."""
        host = LOOPBACK if on_one_node else ray.util.get_node_ip_address()
        listening = listen_at(host)
        meeting = Meeting(host, listening.getsockname()[1], new_key())
        self._store = open_store(meeting, self._timeout, listening)
        return meeting

    def start(self, meeting: Meeting) -> None:
        """Meet the other ranks, load the model, build the engine. Raises ConfigError, see `settle_forward`, and ResourceError, see
        `join_process_group`."""
        spec, on_cpu = self.spec, self.device.type == "cpu"
        torch.set_num_threads(spec.learner.num_threads or (1 if on_cpu and self.num_ranks > 1 else usable_cpus()))
        torch.manual_seed(spec.seed + self.rank)
        self._store = join_process_group(meeting, self._store, self.rank, self.num_ranks, self._timeout, on_cpu=on_cpu)
        self._ranks = sequence.join(spec.learner.sequence_parallel_size, self._timeout)
        spec = choose_forward(spec)
        self._engine = build_engine(spec, self.device, self._ranks)
        spec = settle_forward(spec, self._engine, self._ranks)
        if spec.needs_reference_model:
            self._reference = build_reference(spec, self.device, self._ranks)
        if spec.needs_critic:
            self._critic = Critic(spec, self.device, self._ranks)
        self._configure(spec)
        end_of_imports()

    def _configure(self, spec: LearnerSpec) -> None:
        """Train the existing engines by this spec."""
        hf = self._engine.module.hf
        self.spec = spec
        self._algorithm = spec.algorithm or AlgorithmConfig()
        self._objective = build_objective(spec)
        self._loader = MicroBatchLoader(
            spec, self._objective, self.rank, self._ranks, self.device, share_prompts=can_share_prompts(spec, hf)
        )
        balance(self._engine.module.routing, spec, self._objective, self._loader.unit, self.num_ranks)
        self._flops = FlopCounter(model_shape(hf), shared_prompts=self._loader.share_prompts)
        self._passes = LogprobPasses(spec, self._engine, self._reference, self._timer)

    @property
    def _timeout(self) -> timedelta:
        """The timeout of each collective."""
        return timedelta(seconds=self.spec.collective_timeout_s)

    # Update.

    @traced("update")
    def update(self, batch: TrainBatch) -> UpdateReport:
        """Train on the batch: every pass, every mini-batch; without what `accumulate` has already taken.

        Raises:
            NonFiniteError: on all ranks alike, naming the sample; the weights are those before that mini-batch, or before
                the update, if it is a KL.
            ConfigError: a sample is longer than a micro-batch may be.
            WorkerError: samples could not be fetched, or one that arrived in a part is not in the batch.
        """
        started = time.monotonic()
        metrics = self._update_full_batch(batch) if self._early is None else self._finish_parts(batch, self._early)
        self._refresh_reference(batch.step)
        metrics |= self._timer.metrics()
        metrics |= self._throughput(metrics["tokens/processed"])
        seconds = time.monotonic() - started
        return UpdateReport(step=batch.step, metrics=metrics, seconds=seconds, tracks=(self.activity.finish(),))

    def _update_full_batch(self, batch: TrainBatch) -> dict[str, float]:
        self._timer.restart()
        self._flops.restart()
        plan, mini_batches, kl_metrics = self._prepare(batch)
        accumulation = self._new_accumulation()
        for _ in range(self._algorithm.num_iterations):
            for planned, mini_batch in zip(plan, mini_batches, strict=True):
                with self._timer.phase("forward_backward"):
                    accumulation.forward_backward(mini_batch, batch)
                    accumulation.check_finite(batch)
                with self._timer.phase("step"):
                    accumulation.step(batch)
                for data in chain.from_iterable(mini_batches):
                    data.moved = True
                if self._critic is not None:
                    with self._timer.phase("critic"):
                        num_tokens = sum(batch.samples[i].num_sampled for i in planned.samples)
                        self._critic.update(mini_batch, num_tokens, self.num_ranks)
        metrics = accumulation.metrics() | kl_metrics
        return metrics if self._critic is None else metrics | self._critic.take_metrics()

    def _prepare(self, batch: TrainBatch) -> tuple[list[MiniBatchPlan], list[list[MicroBatchData]], dict[str, float]]:
        """The mini-batches, with all that their losses need; and the metrics of the KL in the reward."""
        kl_in_reward = self._algorithm.kl_in == "reward"
        plan = self._loader.plan(batch)
        kl_only = self._loader.plan_kl_only(batch) if kl_in_reward else []
        self._flops.add(batch, plan, update_passes(self.spec, batch))
        self._flops.add(batch, kl_only, kl_only_passes(self.spec, batch))
        with self._timer.phase("fetch"):
            fetched = [
                self._loader.fetch(
                    batch, planned, self._loader.normalizers([batch.samples[i] for i in planned.samples])
                )
                for planned in plan + kl_only
            ]
        mini_batches = fetched[: len(plan)]
        self._passes.set_old(fetched if kl_in_reward else mini_batches[1:], batch)
        self._passes.set_reference(fetched, batch)
        kl_metrics: dict[str, float] = {}
        if kl_in_reward:
            num_tokens = [batch.samples[i].num_sampled for planned in plan + kl_only for i in planned.samples]
            kl_metrics = kl.penalise(fetched, num_tokens, batch, self._algorithm, self._ranks, self.device)
        if self._critic is not None:
            with self._timer.phase("critic"):
                self._critic.set_advantages(list(chain.from_iterable(mini_batches)))
        return plan, mini_batches, kl_metrics

    def _finish_parts(self, batch: TrainBatch, early: Accumulation) -> dict[str, float]:
        """Train the rest of a batch that arrived in parts, and take the optimizer step."""
        self.accumulate(replace(batch, samples=early.rest(batch)))
        self._early = None
        early.check_finite(batch)
        trained = [s for s in batch.samples if is_trained(s)]
        # With no parts it is as with a batch that arrived whole: nothing went forward or backward, so there is no step to take.
        if trained:
            weight = self._objective.weight
            factor = weight(1, self._loader.normalizers(trained)) / weight(1, self._loader.unit)
            with self._timer.phase("step"):
                early.step(batch, factor)
        return early.metrics()

    @traced("update")
    def accumulate(self, part: TrainBatch) -> None:
        """Run forward and backward of groups that are sure to be in the step's batch, while others are still sampled.

        The gradient is a sum: the normalizers, unknown until the batch is complete, are a common factor of all of it,
        and `update` multiplies by it.
        """
        if self._early is None:
            self._timer.restart()
            self._flops.restart()
            self._early = self._new_accumulation()
        self._early.add_part(part)
        plan = self._loader.plan(part)
        self._flops.add(part, plan, update_passes(self.spec, part))
        for planned in plan:
            with self._timer.phase("fetch"):
                mini_batch = self._loader.fetch(part, planned, self._loader.unit)
            self._passes.set_reference([mini_batch], part)
            with self._timer.phase("forward_backward"):
                self._early.forward_backward(mini_batch, part)

    def _new_accumulation(self) -> Accumulation:
        return Accumulation(self.spec, self._engine, self._objective, self._ranks, self.device)

    def _refresh_reference(self, step: int) -> None:
        every = self._algorithm.ref_refresh_steps
        if self._reference is not None and every and step % every == 0:
            with self._timer.phase("reference"):
                reference.follow(self._reference_model, self._engine.module, self._algorithm.ref_polyak_tau)

    def _throughput(self, num_tokens: float) -> dict[str, float]:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return throughput_metrics(
            self._flops.total, num_tokens, self._timer.total_s, self.num_ranks, device, self.spec.model.dtype
        )

    @traced("values")
    @torch.no_grad()
    def values(self, batch: TrainBatch) -> list[float]:
        """[S] the current model's value of each sample: its log-probability, or a reward model's score. All ranks together."""
        values_S = torch.zeros(len(batch.samples), dtype=torch.float64, device=self.device)
        for planned in self._loader.plan(batch):
            for data in self._loader.fetch(batch, planned, self._loader.unit):
                logps_C = self._passes.policy_logprobs(data, batch.temperature)
                if not data.packed.is_dummy and self._ranks.rank == 0:
                    # Each sample is counted by one rank, so the sum over ranks only spreads its bits.
                    places_C = torch.from_numpy(data.packed.samples).to(self.device)
                    places_S = places_C[data.segments.lengths_S.cumsum(0) - 1]
                    values_S[places_S] = self._objective.value(logps_C, data.segments).double()
        dist.all_reduce(values_S)
        told: list[float] = values_S.tolist()
        return told

    # Checkpoints. See actors/learner/state.py for what can go wrong.

    @traced("hold")
    def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        """Copy into memory what `write` will write; all ranks together. The previous snapshot is dropped."""
        self._held = None
        learner_state.check_room(self._engine, self.spec, place)
        models = {"policy": learner_state.hold_engine(self._engine)}
        if self._critic is not None:
            models["critic"] = learner_state.hold_engine(self._critic.engine)
        if self.spec.saves_reference:
            models["reference"] = reference.hold(self._reference_model)
        exported = learner_state.hold_export(self._engine, self.spec) if export else None
        self._held = learner_state.LearnerSnapshot(models, learner_state.hold_random_state(), exported)

    @ray.method(concurrency_group=DISK)
    def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        """Write the snapshot in a thread beside the one that trains."""
        held, self._held = self._held, None
        if held is None:
            raise WorkerError(f"learner-{self.rank} was asked to write a checkpoint and holds nothing of one")
        return learner_state.write(held, self.spec, place, self.rank, self.num_ranks)

    @traced("load")
    def load(self, place: CheckpointLocation) -> None:
        with place.reading() as files:
            saved = SavedLearner.open(files)
            learner_state.check_saved(saved, self.spec, place)
            learner_state.load_engine(self._engine, saved, "policy")
            if self._critic is not None:
                learner_state.load_engine(self._critic.engine, saved, "critic")
            if self.spec.saves_reference:
                reference.load_saved(self._reference_model, saved, place)
            learner_state.load_random_state(saved, self.rank)

    @property
    def _reference_model(self) -> PolicyModel:
        model: PolicyModel = self._reference.module if self.spec.learner.zero_stage == 3 else self._reference
        return model

    # Turns with a rollout engine on the same device.

    @traced("offload")
    def offload(self, keep_weights: bool) -> None:
        """Free the device's memory, except for the weights if they are to be sent."""
        engines = [self._engine] if self._critic is None else [self._engine, self._critic.engine]
        models = [] if self._reference is None else [self._reference_model]
        offload(self._host_memory, engines, models, weights(self._engine.module) if keep_weights else ())

    @traced("reload")
    def reload(self) -> None:
        """Take the device's memory back."""
        self._host_memory.give_back()

    # Weights.

    def prepare_weights(self) -> None:
        """Import what sends weights, vLLM included: seconds that the first sync would spend while the engines are paused."""
        from actors.weights import sender  # noqa: F401

    @traced("connect")
    def weights_connect(self, targets: list[EngineTarget], generation: int) -> None:
        if self._sender is None:
            self._sender = self._make_sender()
        self._sender.connect(targets, generation)

    @traced("weights")
    def weights_send(self, version: int) -> SendReport:
        if self._sender is None:
            raise WorkerError(f"learner-{self.rank} was asked to send weights before it was connected to any engine")
        report = self._sender.send(version)
        return {**report, "tracks": [self.activity.finish()]}

    def put_adapter(self) -> AdapterReport | None:
        """Put rank 0's current adapter into the object store; the other ranks take part in gathering and return None."""
        from actors.weights.adapter_sync import AdapterReport

        tensors = learner_state.gather_adapter(self._engine)
        if self.rank != 0:
            return None
        data = adapter_bytes(tensors)
        return AdapterReport(ref=ray.put(data), num_bytes=len(data), checksum=adapter_checksum(data))

    def _make_sender(self) -> WeightSender:
        # Imported here: it imports vLLM, which takes seconds that a run without rollout engines need not spend.
        from actors.weights.sender import WeightSender, ZeroWeightSource

        assert self.spec.weights is not None
        bucket_bytes = self.spec.weights.bucket_bytes(self.spec.weights_backend)
        source = ZeroWeightSource(self._engine.module.hf, bucket_bytes, self.spec.dtype)
        return WeightSender(source, self.rank, self.spec.weights_backend, bucket_bytes, self.spec.sync_timeout_s)
