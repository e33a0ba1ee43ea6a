"""All learner ranks as one `grpo_ray.loop.roles.Learner`, and as the learner's side of a weight sync.

Every call goes to all ranks at once. When one of them dies, hangs or falls out of step, the others wait for it inside a
collective; so the whole group is ended, and the error names the rank and shows the end of its log.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from actors.cluster import gpus_per_learner
from actors.deaths import KernelKills, fate, killed_by_kernel, kind_of
from actors.learner.actor import DISK, LearnerActor
from actors.learner.build import LearnerSpec
from actors.places import Places, placed, reserve_ranks
from actors.runtime import ALLOCATOR_ENV, RayActors, log_tail, start_named
from actors.weights.sync import resolve_backend
from grpo_ray.config.common import DeadlineConfig
from grpo_ray.config.learner import CriticConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig, preferences
from grpo_ray.errors import DeadlineError, GrpoRayError, NoMemoryError, WorkerError
from grpo_ray.machine import usable_cpus
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.manifest import FileSum
from grpo_ray.types import TrainBatch, UpdateReport

if TYPE_CHECKING:
    from actors.weights.adapter_sync import AdapterReport
    from actors.weights.protocol import EngineTarget, SendReport

GRACE_S = 5.0
"""The wait, after one rank failed, for the others to fail with it, or to finish."""


class LearnerGroup:
    """All learner ranks; made by `create`."""

    def __init__(
        self, actors: list[Any], spec: LearnerSpec, deadlines: DeadlineConfig, places: Places | None = None
    ) -> None:
        """`places` are the ranks' own, and end with them."""
        self._actors = actors
        self._places = places
        self._spec = spec
        self._deadlines = deadlines
        self._broken: str | None = None
        self._kernel = KernelKills()
        self.unsent = False
        """See `actors.weights.protocol.LearnerWeights`."""

    @classmethod
    async def create(
        cls,
        config: RunConfig | SftConfig,
        model_path: str,
        run_dir: str,
        *,
        has_gpus: bool = False,
        num_steps: int | None = None,
        placement: Places | None = None,
        limit_s: float | None = None,
    ) -> LearnerGroup:
        """Start the ranks side by side, `learner-0` and so on, with the model loaded.

        Args:
            model_path: a folder or a name on the hub; `model.tiny` already exists.
            has_gpus: the cluster has GPUs, so each rank gets one unless `learner.num_gpus` says otherwise.
            num_steps: steps of the whole run, for a schedule that needs an end. None: `config.num_steps`.
            placement: a place for each rank, where it shares a GPU. None: they get places of their own.
            limit_s: the longest start, in seconds. None: `deadlines.start_s`.

        Raises:
            ConfigError: the model can't be loaded, or the schedule's end is not known.
            DeadlineError: not started within `limit_s`.
            WorkerError: a rank died.
        """
        spec = _spec(config, model_path, run_dir, has_gpus, config.num_steps if num_steps is None else num_steps)
        learner = config.learner
        num_gpus = gpus_per_learner(config, has_gpus)
        limit_s = config.deadlines.start_s if limit_s is None else limit_s
        give_up = time.monotonic() + limit_s
        own = None if placement else await reserve_ranks(learner, num_gpus, limit_s)
        group = cls([], spec, config.deadlines.model_copy(update={"sync_s": spec.sync_timeout_s}), own)
        try:
            group._actors = [
                start_named(
                    RayActors(),
                    LearnerActor,
                    spec,
                    rank,
                    learner.num_actors,
                    run_dir=run_dir,
                    name=f"learner-{rank}",
                    num_cpus=learner.num_cpus,
                    num_gpus=num_gpus,
                    max_restarts=0,
                    concurrency_groups={DISK: 1},
                    runtime_env={"env_vars": _env(config, on_gpu=num_gpus > 0)},
                    **placed(learner, placement or own, rank),
                )
                for rank in range(learner.num_actors)
            ]
            left = max(give_up - time.monotonic(), 0.1)
            nodes = await group._call("node", deadline="start_s", seconds=left)
            left = max(give_up - time.monotonic(), 0.1)
            (meeting,) = await group._call(
                "rendezvous", len(set(nodes)) == 1, deadline="start_s", seconds=left, only_first=True
            )
            left = max(give_up - time.monotonic(), 0.1)
            await group._call("start", meeting, deadline="start_s", seconds=left)
        except BaseException:
            await group.close()
            raise
        return group

    @property
    def num_ranks(self) -> int:
        return len(self._actors)

    @property
    def lost(self) -> str | None:
        """Why the group is of no more use: a rank died, hung or fell out of step, and all were ended."""
        return self._broken

    async def accumulate(self, part: TrainBatch) -> None:
        """See `LearnerActor.accumulate`. The ranks have the call before this first awaits.

        Raises:
            DeadlineError: not finished within `deadlines.update_s`; the group is ended.
            WorkerError: a rank died; the group is ended.
        """
        await self._call("accumulate", ray.put(_with_refs(part)), deadline="update_s")

    async def update(self, batch: TrainBatch) -> UpdateReport:
        """See `LearnerActor.update`. References that are plain lists are put into the object store first.

        Raises:
            NonFiniteError: a loss is not finite; the group lives on.
            DeadlineError: not finished within `deadlines.update_s`; the group is ended.
            WorkerError: a rank died; the group is ended.
        """
        self.unsent = True
        reports: list[UpdateReport] = await self._call("update", ray.put(_with_refs(batch)), deadline="update_s")
        return replace(reports[0], tracks=tuple(t for r in reports for t in r.tracks))

    async def values(self, batch: TrainBatch) -> list[float]:
        """See `LearnerActor.values`.

        Raises:
            DeadlineError: not finished within `deadlines.update_s`; the group is ended.
            WorkerError: a rank died; the group is ended.
        """
        values: list[list[float]] = await self._call("values", ray.put(_with_refs(batch)), deadline="update_s")
        return values[0]

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        """See `LearnerActor.hold`."""
        await self._call("hold", place, deadline="save_s", export=export)

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        """See `LearnerActor.write`; training goes on meanwhile, and so does the group if a rank can't write.

        Raises:
            CheckpointError: a write failed.
            DeadlineError: not finished within `deadlines.save_s`; the group is ended.
            WorkerError: a rank died; the group is ended.
        """
        sums: list[dict[str, FileSum]] = await self._call("write", place, deadline="save_s", together=False)
        return {name: entry for of_rank in sums for name, entry in of_rank.items()}

    async def load(self, place: CheckpointLocation) -> None:
        """See `LearnerActor.load`."""
        await self._call("load", place, deadline="save_s")

    async def offload(self, *, keep_weights: bool) -> None:
        """See `actors.control.colocated.OffloadingLearner`."""
        # The first time it pins memory, a second for every few gigabytes.
        await self._call("offload", keep_weights, deadline="update_s")

    async def reload(self) -> None:
        await self._call("reload", deadline="update_s")

    def prepare_weights(self) -> None:
        """Let the ranks prepare to send weights while the engines sample for the first time. Nobody waits for it: errors show when
        they connect."""
        for actor in self._actors:
            actor.prepare_weights.remote()

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        """See `actors.weights.protocol.LearnerWeights`."""
        await self._call("weights_connect", list(targets), generation, deadline="sync_s")

    async def send_weights(self, version: int) -> SendReport:
        """See `actors.weights.protocol.LearnerWeights`. The ranks have the call before this first awaits."""
        self.unsent = False
        reports: list[SendReport] = await self._call("weights_send", version, deadline="sync_s")
        return {**reports[0], "tracks": [t for r in reports for t in r.get("tracks", ())]}

    async def put_adapter(self) -> AdapterReport:
        """See `actors.weights.adapter_sync.LearnerAdapters`. The ranks have the call before this first awaits."""
        report: AdapterReport
        self.unsent = False
        report, *_ = await self._call("put_adapter", deadline="sync_s")
        return report

    async def close(self) -> None:
        """End every rank at once."""
        self._end("it is closed")
        if self._places is not None:
            self._places.remove()

    async def _call(
        self,
        method: str,
        *args: Any,
        deadline: str,
        seconds: float | None = None,
        only_first: bool = False,
        together: bool = True,
        **kwargs: Any,
    ) -> list[Any]:
        """Call `method` on every rank; returns the results in order of rank. `together`: a rank that fails leaves the others
        waiting for it."""
        if self._broken is not None:
            raise WorkerError(f"the learner group can't {method}: {self._broken}")
        limit = getattr(self._deadlines, deadline) if seconds is None else seconds
        actors = self._actors[:1] if only_first else self._actors
        calls = [asyncio.wrap_future(getattr(actor, method).remote(*args, **kwargs).future()) for actor in actors]
        until = asyncio.FIRST_EXCEPTION if together else asyncio.ALL_COMPLETED
        done, pending = await asyncio.wait(calls, timeout=limit, return_when=until)
        failed = together and any(c.exception() is not None for c in done)
        if failed and pending:
            _, pending = await asyncio.wait(calls, timeout=min(GRACE_S, limit))
        errors = {rank: e for rank, c in enumerate(calls) if c.done() and (e := c.exception()) is not None}
        waiting = [f"learner-{rank}" for rank, c in enumerate(calls) if not c.done()]
        for call in pending:
            call.cancel()
        if errors:
            raise self._failure(method, errors, in_step=not waiting)
        if waiting:
            names = ", ".join(waiting)
            self._end(f"{names} did not finish {method} in time")
            raise DeadlineError(
                f"{names} did not finish {method} within {limit:g} s, and the learners were ended; raise "
                f"deadlines.{deadline}, or see why in {self._log(int(waiting[0].rpartition('-')[2]))}"
            )
        return [c.result() for c in calls]

    def _failure(self, method: str, errors: dict[int, BaseException], *, in_step: bool) -> BaseException:
        """The error to raise. The group survives only if all ranks returned, and every failure is one that allows it."""
        short = (rank for rank, e in errors.items() if kind_of(e) == "out of memory")
        if (rank := next(short, None)) is not None:
            self._end(f"learner-{rank} died for lack of memory")
            return NoMemoryError(f"learner-{rank} died during {method}: {fate(errors[rank], f'learner-{rank}')}")
        died = {rank: e for rank, e in errors.items() if kind_of(e) == "died"}
        for rank in died:
            self._end(f"learner-{rank} died")
            if self._kernel.took_some():
                return NoMemoryError(f"learner-{rank} died during {method}: {killed_by_kernel(f'learner-{rank}')}")
            log = self._log(rank)
            return WorkerError(f"learner-{rank} died during {method}; the end of {log}:\n{log_tail(log)}")
        # A rank's own error comes before what the others report of the broken connection to it.
        causes = {rank: e.cause if isinstance(e, RayTaskError) else e for rank, e in errors.items()}
        typed = [e for e in causes.values() if isinstance(e, GrpoRayError)]
        if not in_step or len(typed) < len(causes):
            self._end(f"{method} failed on {', '.join(f'learner-{r}' for r in errors)}")
        if typed:
            return typed[0]
        rank, cause = next(iter(causes.items()))
        return WorkerError(
            f"learner-{rank} failed in {method}: {type(cause).__name__}: {cause}; more in {self._log(rank)}"
        )

    def _end(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
        for actor in self._actors:
            ray.kill(actor, no_restart=True)

    def _log(self, rank: int) -> Path:
        return Path(self._spec.run_dir) / "logs" / f"learner-{rank}.log"


def _spec(
    config: RunConfig | SftConfig, model_path: str, run_dir: str, has_gpus: bool, num_steps: int | None
) -> LearnerSpec:
    grpo = config if isinstance(config, RunConfig) else None
    algorithm = grpo.algorithm if grpo else None
    backend = resolve_backend(grpo, has_gpus=has_gpus) if grpo else "gloo"
    per_step = algorithm.num_iterations * algorithm.num_mini_batches if algorithm else 1
    return LearnerSpec(
        model_path=model_path,
        run_dir=run_dir,
        seed=config.seed,
        model=config.model,
        learner=config.learner,
        algorithm=algorithm,
        preferences=preferences(config),
        critic=grpo.critic if grpo else CriticConfig(),
        weights=grpo.weights if grpo else None,
        weights_backend=backend,
        max_completion_length=grpo.rollout.max_completion_length if grpo else 0,
        num_optimizer_steps=None if num_steps is None else num_steps * per_step,
        collective_timeout_s=max(config.deadlines.update_s, config.deadlines.save_s),
        sync_timeout_s=config.deadlines.of_sync(has_gpus=has_gpus),
        keep_routing=grpo is not None and grpo.rollout.keep_routing,
    )


# oneDNN prepares a product for each shape (grpo_ray/models/linear.py). Those of one micro-batch are kept, five layer shapes with
# three products each, instead of 1,024.
ONEDNN_ENV = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


def _env(config: RunConfig | SftConfig, *, on_gpu: bool) -> dict[str, str]:
    learner = config.learner
    env = ALLOCATOR_ENV | ONEDNN_ENV | {"TOKENIZERS_PARALLELISM": "false"}
    if not on_gpu:
        # Waiting threads must sleep: the cores are shared with the rollout engines.
        env |= {"DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "passive", "CUDA_VISIBLE_DEVICES": ""}
    threads = learner.num_threads or (1 if learner.num_actors > 1 else usable_cpus())
    return env | {"OMP_NUM_THREADS": str(threads)} | learner.env


def _with_refs(batch: TrainBatch) -> TrainBatch:
    """The batch with each distinct list of samples put into the object store once and replaced by its reference."""
    put: dict[int, Any] = {}
    for sample in batch.samples:
        if not isinstance(sample.ref, ray.ObjectRef) and id(sample.ref) not in put:
            put[id(sample.ref)] = ray.put(sample.ref)
    if not put:
        return batch
    return replace(batch, samples=[replace(s, ref=put.get(id(s.ref), s.ref)) for s in batch.samples])
