"""One DeepSpeed rank. All ranks get the same batch, make the same plan, and each takes its own micro-batches from it.

    fetch own samples -> [old log-probabilities] -> [reference] -> [critic: advantages] -> for each mini-batch:
    micro-batches, then one optimizer step; then, where it is due, the reference takes over the new weights

`old` costs a pass of its own only where the weights move before a sample's turn: for every mini-batch but the first (and
for none where the sampler's own report is taken for it).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import ray
import torch
import torch.distributed as dist

from actors import learner_reference, learner_state
from actors.learner_critic import Critic
from actors.learner_engine import LearnerSpec, build_engine, build_reference, step
from actors.runtime import own_log
from grpo_ray.activity import Activity
from grpo_ray.batching import MiniBatchPlan, PackItem, pack, plan_batch
from grpo_ray.config import AlgorithmConfig
from grpo_ray.errors import NonFiniteError, WorkerError
from grpo_ray.flops import ModelShape, UpdatePasses, model_shape, throughput_metrics, update_flops
from grpo_ray.lora import adapters_off
from grpo_ray.losses.aggregation import Normalizers
from grpo_ray.objectives import GrpoObjective, MicroBatchData, Objective, SftObjective
from grpo_ray.policy import PolicyModel
from grpo_ray.types import Sample, TrainBatch, UpdateReport

if TYPE_CHECKING:
    from actors.weight_sender import WeightSender
    from actors.weights import EngineTarget, SendReport

FETCH_TIMEOUT_S = 120.0
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


class LearnerActor:
    """Lives in its own process, started by `LearnerGroup`: first `rendezvous` on rank 0, then `start` on all."""

    def __init__(self, spec: LearnerSpec, rank: int, num_ranks: int) -> None:
        self.log_path = own_log(spec.run_dir, f"learner-{rank}")
        self.spec = spec
        self.rank = rank
        self.num_ranks = num_ranks
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self._algorithm = spec.algorithm or AlgorithmConfig()
        self._objective = _objective(spec.algorithm)
        self._seconds: dict[str, float] = {}
        self._activity = Activity(f"learner-{rank}")
        self._store: dist.TCPStore | None = None
        self._engine: Any = None
        self._shape: ModelShape | None = None
        self._reference: Any = None
        self._critic: Critic | None = None
        self._sender: WeightSender | None = None

    # Start.

    def rendezvous(self) -> tuple[str, int]:
        """Host and port where the ranks meet. The port is bound from here on: nobody can take it in between."""
        host = ray.util.get_node_ip_address()
        self._store = self._open_store(host, 0)
        return host, self._store.port

    def start(self, host: str, port: int) -> int:
        """Meet the others, load the model, build the engine. Returns the number of parameters."""
        learner = self.spec.learner
        on_cpu = self.device.type == "cpu"
        one = on_cpu and self.num_ranks > 1
        torch.set_num_threads(learner.num_threads or (1 if one else len(os.sched_getaffinity(0))))
        torch.manual_seed(self.spec.seed + self.rank)
        os.environ |= {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }
        dist.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            store=self._store or self._open_store(host, port),
            rank=self.rank,
            world_size=self.num_ranks,
            timeout=timedelta(seconds=self.spec.collective_timeout_s),
        )
        import deepspeed

        # Compiled at first use (18 s and more), for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
        self._engine = build_engine(self.spec, self.device)
        self._shape = model_shape(self._engine.module.hf)
        if self.spec.needs_reference_model:
            self._reference = build_reference(self.spec, self.device)
        if self.spec.needs_critic:
            self._critic = Critic(self.spec, self.device)
        return sum(getattr(p, "ds_numel", p.numel()) for p in self._engine.module.parameters())

    def _open_store(self, host: str, port: int) -> dist.TCPStore:
        timeout = timedelta(seconds=self.spec.collective_timeout_s)
        return dist.TCPStore(host, port, is_master=port == 0, wait_for_workers=False, timeout=timeout)

    # Update.

    @_recorded("update")
    def update(self, batch: TrainBatch) -> UpdateReport:
        """Train on the batch: every pass, every mini-batch.

        Raises:
            NonFiniteError: on all ranks alike, naming the sample; the weights are as they were before that mini-batch.
            ConfigError: a sample is longer than a micro-batch may be.
            WorkerError: samples could not be fetched.
        """
        started = time.monotonic()
        self._seconds = dict.fromkeys(("fetch", "old", "reference", "critic", "forward_backward", "step"), 0.0)
        plan = self._plan(batch)
        with self._timed("fetch"):
            steps = self._fetch(batch, plan)
        with self._timed("old"):
            later = steps[1:] if self._algorithm.old_logprobs == "recompute" else []
            for data in (data for mini_batch in later for data in mini_batch):
                data.old_C = self._logprobs(self._engine, data, batch.temperature)
        if self.spec.needs_reference:
            with self._timed("reference"), self._reference_policy() as reference:
                for data in (data for mini_batch in steps for data in mini_batch):
                    data.ref_C = self._logprobs(reference, data, batch.temperature)
        if self._critic is not None:
            with self._timed("critic"):
                self._critic.set_advantages([data for mini_batch in steps for data in mini_batch])
        sums = torch.zeros(len(self._objective.sum_names), device=self.device)
        largest = torch.zeros((), device=self.device)
        grad_norms, learning_rates = [], []
        for _ in range(self._algorithm.num_iterations):
            for mini_batch, planned in zip(steps, plan, strict=True):
                with self._timed("forward_backward"):
                    new_sums, new_largest = self._forward_backward(mini_batch, batch)
                    sums += new_sums
                    largest = torch.maximum(largest, new_largest)
                with self._timed("step"):
                    learning_rates.append(float(self._engine.get_lr()[0]))
                    grad_norms.append(self._step(batch))
                if self._critic is not None:
                    with self._timed("critic"):
                        num_tokens = sum(batch.samples[i].num_tokens for i in planned.samples)
                        self._critic.update(mini_batch, num_tokens, self.num_ranks)
        every = self._algorithm.ref_refresh_steps
        if self._reference is not None and every and (batch.step + 1) % every == 0:
            with self._timed("reference"):
                learner_reference.follow(self._reference_model, self._engine.module, self._algorithm.ref_polyak_tau)
        metrics = self._metrics(sums, largest, steps, grad_norms, learning_rates)
        if self._critic is not None:
            metrics |= self._critic.take_metrics()
        seconds = time.monotonic() - started
        metrics |= self._throughput(batch, plan, seconds, metrics["tokens/processed"])
        return UpdateReport(step=batch.step, metrics=metrics, seconds=seconds, tracks=(self._activity.finish(),))

    def _throughput(
        self, batch: TrainBatch, plan: list[MiniBatchPlan], seconds: float, num_tokens: float
    ) -> dict[str, float]:
        passes = UpdatePasses(
            train=self._algorithm.num_iterations,
            reference=self.spec.needs_reference,
            old=self._algorithm.old_logprobs == "recompute",
            critic=self._critic is not None,
        )
        flops = update_flops(self._shape, batch, plan, passes) if self._shape else None
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else ""
        return throughput_metrics(flops, num_tokens, seconds, self.num_ranks, device, self.spec.model.dtype)

    def _plan(self, batch: TrainBatch) -> list[MiniBatchPlan]:
        """Over the samples that are trained; the plan's indices point into `batch.samples`."""
        trained = [i for i, s in enumerate(batch.samples) if s.loss_mask and s.num_tokens > 0]
        skip = self.spec.learner.skip_no_signal
        plans = plan_batch(
            [batch.samples[i].num_prompt_tokens + batch.samples[i].num_tokens for i in trained],
            [batch.samples[i].group for i in trained],
            num_ranks=self.num_ranks,
            num_mini_batches=self._algorithm.num_mini_batches,
            micro_batch_tokens=self.spec.learner.micro_batch_tokens,
            padded=not self.spec.learner.packing,
            idle={n for n, i in enumerate(trained) if skip and not self._objective.moves(batch.samples[i].advantage)},
        )
        return [plan.renumbered(trained) for plan in plans]

    def _fetch(self, batch: TrainBatch, plan: list[MiniBatchPlan]) -> list[list[MicroBatchData]]:
        mine = [micro for mini_batch in plan for micro in mini_batch.ranks[self.rank]]
        refs = list({batch.samples[i].ref: None for micro in mine for i in micro})
        try:
            rows: dict[Any, list[Sample]] = dict(zip(refs, ray.get(refs, timeout=FETCH_TIMEOUT_S), strict=True))
        except ray.exceptions.RayError as e:
            raise WorkerError(
                f"learner-{self.rank} can't fetch samples of step {batch.step} from the object store: {e}"
            ) from None
        out = []
        for mini_batch in plan:
            members = [batch.samples[i] for i in mini_batch.samples]
            normalizers = Normalizers(
                num_sequences=len(members),
                num_tokens=sum(s.num_tokens for s in members),
                max_completion_length=self.spec.max_completion_length,
            )
            micros = mini_batch.ranks[self.rank]
            padded = not self.spec.learner.packing
            packed = [pack([self._item(batch, i, rows, normalizers) for i in micro], padded=padded) for micro in micros]
            out.append([MicroBatchData.of(p, self.device) for p in packed])
        return out

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
            advantage=info.advantage,
            weight=self._objective.weight(info.num_tokens, normalizers),
            sample=index,
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
        logp_C: torch.Tensor = model(data.packed, temperature)[0]
        return logp_C

    def _forward_backward(
        self, mini_batch: list[MicroBatchData], batch: TrainBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = torch.zeros(len(self._objective.sum_names), device=self.device)
        largest = torch.zeros((), device=self.device)
        suspects = []
        for data in mini_batch:
            theta_C, entropy_C = self._engine(data.packed, batch.temperature)
            loss, new_sums, new_largest = self._objective.loss(data, theta_C, entropy_C)
            # DeepSpeed averages gradients over the ranks; the weights in the loss already hold the global normalizer.
            self._engine.backward(loss * self.num_ranks, scale_wrt_gas=False)
            if not data.packed.is_dummy:
                sums += new_sums
                largest = torch.maximum(largest, new_largest)
                suspects.append((data, theta_C.detach(), loss.detach()))
        self._check_finite(suspects, batch)
        return sums, largest

    def _check_finite(
        self, suspects: list[tuple[MicroBatchData, torch.Tensor, torch.Tensor]], batch: TrainBatch
    ) -> None:
        """Before the step, all ranks agree whether every loss is a number."""
        wrong = torch.stack([~loss.isfinite() for *_, loss in suspects]).any() if suspects else torch.tensor(False)
        flag = wrong.to(device=self.device, dtype=torch.float32).reshape(1)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() == 0:
            return
        names: list[str | None] = [None] * self.num_ranks
        dist.all_gather_object(names, self._culprit(suspects, batch))
        self._discard_gradients()
        culprit = next(n for n in names if n)
        raise NonFiniteError(
            f"step {batch.step + 1}: the loss of sample {culprit} is not a finite number; the weights were left as they "
            "are. Lower learner.learning_rate, or look at this sample"
        )

    @staticmethod
    def _culprit(suspects: list[tuple[MicroBatchData, torch.Tensor, torch.Tensor]], batch: TrainBatch) -> str | None:
        for data, theta_C, loss in suspects:
            if not loss.isfinite():
                tokens = ~(theta_C.isfinite() & data.rollout_C.isfinite() & data.advantages_C.isfinite())
                sample = batch.samples[int(data.packed.samples[int(tokens.int().argmax())])]
                return f"{sample.prompt_id}[{sample.index}]"
        return None

    def _discard_gradients(self) -> None:
        """DeepSpeed's optimizers drop gradients that are not finite, and skip the step."""
        if self.spec.learner.zero_stage == 0:
            self._engine.zero_grad()
        else:
            self._engine.step()

    def _step(self, batch: TrainBatch) -> float:
        try:
            return step(self._engine)
        except NonFiniteError as e:
            raise NonFiniteError(
                f"step {batch.step + 1}: {e}, though every loss is finite. Lower learner.learning_rate"
            ) from None

    def _metrics(
        self,
        sums: torch.Tensor,
        largest: torch.Tensor,
        steps: list[list[MicroBatchData]],
        grad_norms: list[float],
        learning_rates: list[float],
    ) -> dict[str, float]:
        own = [data.packed for mini_batch in steps for data in mini_batch]
        inputs = float(sum(p.num_tokens for p in own))
        counts = [
            float(sum(len(p.targets) for p in own if not p.is_dummy)),
            inputs,
            float(sum(p.is_dummy for p in own)),
        ]
        totals = torch.cat([sums.double(), torch.tensor(counts, dtype=torch.float64, device=self.device)])
        highest = torch.stack([largest.double(), torch.tensor(inputs, dtype=torch.float64, device=self.device)])
        dist.all_reduce(totals)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        *reduced, trained, all_inputs, dummies = totals.tolist()
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
            "update/imbalance": most_inputs * self.num_ranks / max(all_inputs, 1.0),
            "tokens/trained": trained,
            "tokens/processed": all_inputs,
            **{f"update/{name}_s": seconds for name, seconds in self._seconds.items()},
        }

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        with self._activity.span(name):
            yield
        self._seconds[name] += time.monotonic() - started

    # Checkpoints: all ranks together. See actors/learner_state.py for what can go wrong.

    @_recorded("save")
    def save(self, folder: str) -> None:
        learner_state.save(self._engine, self.spec, Path(folder))
        if self.spec.saves_reference:
            learner_reference.save(self._reference_model, Path(folder))
        if self._critic is not None:
            self._critic.save(Path(folder))

    @_recorded("load")
    def load(self, folder: str) -> None:
        learner_state.load(self._engine, self.spec, Path(folder))
        if self.spec.saves_reference:
            learner_reference.load(self._reference_model, Path(folder))
        if self._critic is not None:
            self._critic.load(Path(folder))

    @property
    def _reference_model(self) -> PolicyModel:
        model: PolicyModel = self._reference.module if self.spec.learner.zero_stage == 3 else self._reference
        return model

    @_recorded("export")
    def export(self, folder: str) -> None:
        learner_state.export(self._engine, self.spec, Path(folder))

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

    def _make_sender(self) -> WeightSender:
        # Imported here: it brings vLLM with it, which takes seconds that a run without samplers need not spend.
        from actors.weight_sender import WeightSender, ZeroWeightSource

        assert self.spec.weights is not None
        bucket_bytes = self.spec.weights.bucket_mb << 20
        source = ZeroWeightSource(self._engine.module.hf, bucket_bytes, self.spec.dtype)
        return WeightSender(source, self.rank, self.spec.weights_backend, bucket_bytes, self.spec.sync_timeout_s)


def _objective(algorithm: AlgorithmConfig | None) -> Objective:
    return SftObjective() if algorithm is None else GrpoObjective(algorithm)
