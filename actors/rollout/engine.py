"""One rollout engine as its pool sees it, and how engines are started."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from actors.cluster import demands, gpus_per_engine
from actors.deaths import KernelKills, fate, kind_of
from actors.devices import SharedGpus
from actors.places import Places, placed
from actors.rollout.actor import RolloutActor
from actors.rollout.adapters import AdapterOptions
from actors.rollout.episode import EpisodeOptions
from actors.rollout.poison import is_suspect
from actors.rollout.requests import PendingSample
from actors.rollout.vllm_options import rollout_env
from actors.runtime import Actors, core_error, log_tail, start_named, within
from actors.supervise import Worker
from actors.weights.protocol import EngineTarget
from actors.weights.sync import resolve_backend
from grpo_ray.config.schema import RolloutConfig, RunConfig
from grpo_ray.errors import DeadlineError, GrpoRayError, WorkerError
from grpo_ray.machine import usable_cpus
from grpo_ray.telemetry.activity import IDLE
from grpo_ray.types import SampleInfo, SampleRequest

MAX_RESTARTS = 3
"""An engine that has been restarted this many times without a finished sample in between is given up."""
BACKOFF_S = 1.0
STOP_S = 5.0


@dataclass(eq=False, slots=True)
class RolloutEngine(Worker):
    """One slot of the pool; implements `requests.SamplingEngine`."""

    pids: dict[str, int] = field(default_factory=dict)
    silent_s: float = 0.0
    """The seconds since the engine was last polled."""
    gone: str = ""
    """Why the engine is not restarted any more."""
    version: int | None = None
    work: dict[int, PendingSample] = field(default_factory=dict)
    place: int | None = None
    paused: bool = False
    """Whether the engine is paused for a weight sync."""
    samples: int = 0
    tokens: int = 0
    reported_busy_s: float = 0.0
    """The engine's busy seconds up to the last `take_stats`."""

    @property
    def load(self) -> int:
        return len(self.work)

    @property
    def tries_suspect(self) -> bool:
        return len(self.work) == 1 and is_suspect(next(iter(self.work.values())))

    def submit(self, requests: list[tuple[int, SampleRequest]]) -> None:
        self.handle.submit.remote(requests)

    def cancel(self, number: int) -> None:
        self.handle.cancel.remote([number])

    def has_finished(self, info: SampleInfo) -> None:
        self.samples += 1
        self.tokens += info.num_sampled
        self.restarts = 0

    def show(self) -> None:
        """Record what the engine does now; called after every change of `alive`, `paused` and `work`."""
        if not self.alive:
            self.activity.enter(IDLE if self.gone else "restarting")
        else:
            self.activity.enter("paused" if self.paused else "sampling" if self.work else IDLE)

    def state(self, version: int) -> str:
        """Why the engine takes no request, as the sentence continues after its name; `version` is the current one."""
        if self.gone:
            return "is gone"
        if not self.alive:
            return "restarts"
        return "is busy" if self.version == version else "waits for the current weights"

    def target(self, world_size: int) -> EngineTarget:
        return EngineTarget(self.name, self.incarnation, self.handle, world_size)

    def take_stats(self, elapsed_s: float) -> dict[str, float]:
        """The engine's figures since the last call, `elapsed_s` ago."""
        busy_s = self.activity.busy_s - self.reported_busy_s
        stats = {
            "samples": float(self.samples),
            "tokens": float(self.tokens),
            "busy_s": busy_s,
            "busy": min(1.0, busy_s / elapsed_s),
        }
        self.samples, self.tokens, self.reported_busy_s = 0, 0, self.reported_busy_s + busy_s
        return {f"rollout/{self.index}/{name}": value for name, value in stats.items()}


class RolloutEngineKind:
    """Starts rollout engines; implements `supervise.WorkerKind`."""

    max_restarts = MAX_RESTARTS
    stop_s = STOP_S

    def __init__(
        self,
        config: RunConfig,
        model: str,
        run_dir: str,
        *,
        has_gpus: bool,
        source: Actors,
        placement: Places | None = None,
    ) -> None:
        """`placement` has a place for each GPU that engines share."""
        self._config = config
        self._model = model
        self._run_dir = run_dir
        self._on_gpu = has_gpus
        self._source = source
        self._placement = placement
        self._kernel = KernelKills()
        self.backend = resolve_backend(config, has_gpus=has_gpus)
        self.probe_s = config.deadlines.of_sync(has_gpus=has_gpus)

    def make(self, index: int) -> RolloutEngine:
        return RolloutEngine(index, f"rollout-{index}")

    def launch(self, engine: RolloutEngine) -> Any:
        c, rollout, shared = self._config, self._rollout(), self._shared(engine.index)
        return start_named(
            self._source,
            RolloutActor,
            rollout,
            self._model,
            c.model.dtype,
            c.data.max_prompt_length + rollout.max_completion_length,
            self._run_dir,
            engine.index,
            c.seed,
            self.backend,
            c.model.trust_remote_code,
            AdapterOptions.of(c),
            c.colocated,
            c.data.template,
            shared,
            EpisodeOptions.of(c),
            run_dir=self._run_dir,
            name=engine.name,
            num_cpus=rollout.num_cpus,
            num_gpus=0.0 if shared else gpus_per_engine(c, self._on_gpu),
            max_restarts=0,
            **placed(rollout, self._placement, engine.index * rollout.engine_size),
            runtime_env={"env_vars": rollout_env(rollout, on_gpu=self._on_gpu, backend=self.backend)},
        )

    def _shared(self, index: int) -> SharedGpus | None:
        """The GPUs of an engine that shares several; None: Ray gives it all that it has."""
        size = self._config.rollout.engine_size
        if self._placement is None or size == 1:
            return None
        return SharedGpus(self._placement.of(index, size), gpus_per_engine(self._config, self._on_gpu) / size)

    def _rollout(self) -> RolloutConfig:
        rollout = self._config.rollout
        if not self._config.colocated or rollout.num_threads is not None:
            return rollout
        return rollout.model_copy(update={"num_threads": max(1, usable_cpus() // rollout.num_actors)})

    async def ready(self, engine: RolloutEngine, limit_s: float) -> None:
        """See `supervise.WorkerKind`; the errors show the end of the engine's log."""
        log = Path(self._run_dir) / "logs" / f"{engine.name}.log"
        try:
            engine.pids = await within(
                engine.handle.ready.remote(), limit_s, f"the start of {engine.name}", "deadlines.start_s"
            )
        except DeadlineError as e:
            raise DeadlineError(f"{e}; the end of {log}:\n{log_tail(log)}") from None
        except (RayError, GrpoRayError) as e:
            why = self.fate(e, engine)
            if kind_of(e) != "out of memory":
                why = f"{core_error(log, why)}; the end of {log}:\n{log_tail(log)}"
            raise WorkerError(f"{engine.name} does not start: {why}") from None

    def fate(self, error: BaseException, engine: RolloutEngine) -> str:
        """See `deaths.fate`."""
        return fate(error, engine.name, self._kernel)

    def waits_for(self) -> str:
        asked = next(d for d in demands(self._config, self._on_gpu) if d.option == "rollout")
        where = f" on a node with the labels {dict(asked.labels)}" if asked.labels else ""
        return f"it loads the model, or waits for {asked.each}{where}"

    def backoff_s(self, engine: RolloutEngine, _cause: BaseException) -> float:
        return float(BACKOFF_S * 2 ** (engine.restarts - 1))

    def probe(self, handle: Any) -> Awaitable[Any]:
        """Call the engine's core: the actor answers polls even while the core hangs, and then no sample would end."""
        answer: Awaitable[Any] = handle.probe.remote()
        return answer

    def stop(self, handle: Any) -> Awaitable[Any]:
        answer: Awaitable[Any] = handle.shutdown.remote()
        return answer
