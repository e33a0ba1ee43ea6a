"""One vLLM engine as a Ray actor. Requests arrive in batches and samples leave in batches; tokens in, tokens out.

    submit([(ticket, SampleRequest), ..])             starts them
    poll(max_wait_s) -> [Outcome, ..], [Sample, ..]   what finished since the last poll

The caller owns the object of the samples that a poll returns, so they outlive this actor.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import ray

from actors.deaths import CORE_DIED
from actors.devices import SharedGpus, check_cuda, check_engine_has_gpu, take_gpus
from actors.rollout.adapters import AdapterOptions, EngineAdapters
from actors.rollout.completions import Completions
from actors.rollout.episode import EpisodeOptions, Episodes
from actors.rollout.forked_core import forked_core
from actors.rollout.sample import info_of
from actors.rollout.vllm_options import answers, can_fork, engine_args
from actors.runtime import end_of_imports, own_process, own_scratch, use_batch_scheduling, use_nodes_interface
from grpo_ray.config.rollout import RolloutConfig
from grpo_ray.errors import WorkerError
from grpo_ray.loop.stops import template_end
from grpo_ray.models.files.loading import context_length, eos_ids, load_config, vocab_size
from grpo_ray.types import EpisodeFigures, Sample, SampleInfo, SampleRequest

if TYPE_CHECKING:
    from actors.environment.pool import Members
    from actors.weights.memory import Address

POLL_LINGER_S = 0.01
"""The wait after a finished sample, so that samples that finish together travel together."""
STAGED_POLL_S = 0.01
DEATH_CHECK_S = 0.5
"""How often an idle engine is checked for death."""
SHUTDOWN_S = 2.0
"""The wait for a core that was asked to end. It aborts its requests at once and then frees its objects, often for longer than the
pool waits; whatever it holds is freed with its process."""
SMALL_VOCABULARY = 1024
"""The vocabulary size up to which token ranks are counted faster than the function for it is compiled (256 rows: 1 ms a step
against 0.2)."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    ticket: int
    info: SampleInfo | None
    """The sample's info, with `ref` None and `row` its index in the list of samples beside it; None if there is no sample."""
    problem: Literal["", "refused", "aborted"] = ""
    """`refused`: the engine will never accept this request. `aborted`: something else ended it; it may be retried."""
    detail: str = ""


class RolloutActor:
    """An async Ray actor around one AsyncLLM. It never restarts its engine: when that dies, every method reports it."""

    def __init__(
        self,
        config: RolloutConfig,
        model: str,
        dtype: str,
        max_length: int,
        run_dir: str,
        index: int,
        seed: int,
        backend: str,
        trust_remote_code: bool = False,
        adapters: AdapterOptions | None = None,
        colocated: bool = False,
        template: str = "raw",
        shared: SharedGpus | None = None,
        episodes: EpisodeOptions | None = None,
    ) -> None:
        self.name = f"rollout-{index}"
        own_process(run_dir, self.name)
        take_gpus(shared)
        self._scratch = own_scratch(run_dir, self.name)
        # vLLM's own processes talk to each other on this node alone; `weights.gloo_engine` has an address for others.
        use_nodes_interface(on_one_node=True)
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
        import torch._dynamo
        from vllm.v1.engine.async_llm import AsyncLLM

        from grpo_ray.models.multimodal import is_multimodal

        check_cuda(self.name)
        check_engine_has_gpu(self.name)
        # `max_length` is that of the longest sample, prompt and completion; the model may have been made for less.
        model_config = load_config(model, trust_remote_code=trust_remote_code)
        max_model_len = min(max_length, context_length(model_config))
        args = engine_args(
            config,
            model,
            dtype,
            max_model_len,
            seed,
            backend,
            trust_remote_code=trust_remote_code,
            adapters=adapters,
            colocated=colocated,
            multimodal=is_multimodal(model_config),
        )
        if args.enforce_eager and vocab_size(model_config) <= SMALL_VOCABULARY:
            # Even then vLLM compiles a function of its sampler, for seconds in the first step, which such short rows do not need.
            # One setting is for this process and its forks, which have imported torch, the other for the rest.
            torch._dynamo.config.disable = os.environ.setdefault("TORCH_COMPILE_DISABLE", "1") == "1"
        self._can_sleep = bool(args.enable_sleep_mode)
        with forked_core() if can_fork(args) else nullcontext():
            self.engine: Any = AsyncLLM.from_engine_args(args)
        end_of_imports()
        # The engine's process exists by now, and computes.
        use_batch_scheduling()
        self._adapters = EngineAdapters(self.engine, adapters, model, self.name)
        self.tokenizer: Any = self.engine.get_tokenizer()
        self._completions = Completions(
            self.engine,
            self.tokenizer,
            self.name,
            eos_ids(model, self.tokenizer, trust_remote_code=trust_remote_code),
            template_end(self.tokenizer, template),
            vocab_size(model_config),
        )
        self._episodes: Episodes | None = None
        if episodes is not None:
            self._episodes = Episodes(episodes, self._completions, max_model_len)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outcomes: list[Outcome] = []
        self._samples: list[Sample] = []
        self._arrived = asyncio.Event()
        self._num_tokens = self._num_samples = 0
        self._busy_s = 0.0
        self._busy_since = 0.0

    async def ready(self) -> dict[str, int]:
        """Wait until the engine answers; what it samples from now on is labelled version 0.

        Returns:
            The `pid` of this process, and that of the engine's core (`core_pid`).
        """
        await answers(self.engine)
        await self.engine.update_weight_version("0")
        return {"pid": os.getpid(), "core_pid": self._core_pid()}

    # Sampling

    async def submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        """Start sampling and return at once; the outcomes come by `poll`."""
        if not self._tasks:
            self._busy_since = time.monotonic()
        for ticket, request in requests:
            self._tasks[ticket] = asyncio.create_task(self._draw(ticket, request))

    async def cancel(self, tickets: Sequence[int]) -> None:
        """Stop sampling these; their outcomes are not reported."""
        for ticket in tickets:
            task = self._tasks.get(ticket)
            if task is not None:
                task.cancel()

    async def poll(self, max_wait_s: float) -> tuple[list[Outcome], list[Sample]]:
        """What finished since the last poll. Waits for something to finish, at most `max_wait_s`.

        Raises:
            WorkerError: the engine is dead. What had finished before has been handed out.
        """
        deadline = time.monotonic() + max_wait_s
        while not self._outcomes:
            self._check_alive()
            left = deadline - time.monotonic()
            if left <= 0:
                return [], []
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), min(left, DEATH_CHECK_S))
            except TimeoutError:
                continue
        await asyncio.sleep(POLL_LINGER_S)
        outcomes, samples = self._outcomes, self._samples
        self._outcomes, self._samples = [], []
        return outcomes, samples

    async def _draw(self, ticket: int, request: SampleRequest) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            with self._adapters.use() as adapter:
                if request.episode is None:
                    self._finish(ticket, await self._completions.complete(str(ticket), request, adapter))
                else:
                    assert self._episodes is not None
                    self._finish(
                        ticket, *await self._episodes.draw(request, self._completions.turns(ticket, request, adapter))
                    )
        except EngineDeadError:
            self._arrived.set()
        except VLLMClientError as e:
            self._add(Outcome(ticket, None, "refused", str(e)))
        except Exception as e:
            # Whatever the error is, it belongs to this request alone; unreported, the pool would wait for it until its deadline.
            self._add(Outcome(ticket, None, "aborted", f"{type(e).__name__}: {e} ({e.__cause__})"))
        finally:
            del self._tasks[ticket]
            if not self._tasks:
                self._busy_s += time.monotonic() - self._busy_since

    async def use_environments(self, members: Members) -> None:
        """Play episodes at these workers from now on."""
        assert self._episodes is not None
        self._episodes.client.use(members)

    def _finish(self, ticket: int, sample: Sample, episode: EpisodeFigures | None = None) -> None:
        self._num_tokens += len(sample.token_ids)
        self._num_samples += 1
        self._add(Outcome(ticket, info_of(sample, self.name, len(self._samples), episode)))
        self._samples.append(sample)

    def _add(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._arrived.set()

    # Weights: the far end of `weights.sender.EngineClient`, and the pause around it

    async def pause(self, mode: Literal["keep", "wait", "abort"], clear_cache: bool) -> None:
        """Stop sampling. `keep` freezes what is in progress; `clear_cache` makes it continue under the new weights alone, so that
        the learner can recompute each token's log-probability."""
        self._check_alive()
        await self.engine.pause_generation(mode=mode, clear_cache=clear_cache)

    async def resume(self) -> None:
        await self.engine.resume_generation()

    async def sleep(self) -> None:
        """Free the GPU's memory: weights move to the host's, the KV cache is dropped. On CPUs there is nothing to free."""
        self._check_alive()
        if self._can_sleep:
            await self.engine.sleep(level=1, mode="wait")

    async def wake(self, part: Literal["weights", "kv_cache"] | None) -> None:
        """Take the GPU's memory back, or a part of it; the engine samples again when it has all."""
        self._check_alive()
        if self._can_sleep:
            await self.engine.wake_up(None if part is None else [part])

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self.engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def node(self) -> str:
        """Ray's id of the node that this engine is on."""
        return str(ray.get_runtime_context().get_node_id())

    async def share_memory(self, address: Address) -> bool:
        """Whether this engine can read the sender's memory (gloo)."""
        return all(await self.engine.collective_rpc("weight_transfer_share", args=(address,)))

    async def stage_weights(self) -> None:
        """Begin to receive and pack weights, beside sampling (gloo)."""
        self._check_alive()
        await self.engine.collective_rpc("weight_transfer_stage")

    async def wait_staged(self) -> None:
        """Wait until all staged weights are loaded; the sender enforces the deadline.

        Raises:
            Exception: they did not arrive as they were sent, or can't be loaded. The engine samples on as before.
        """
        while not all(await self.engine.collective_rpc("weight_transfer_staged")):
            await asyncio.sleep(STAGED_POLL_S)

    async def probe(self) -> None:
        """Raise, or never return, if the engine's core is dead or hangs."""
        self._check_alive()
        await self.engine.is_paused()

    async def load_staged(self, version: int, checksum: str) -> None:
        """Take the staged weights into use as `version`; the engine is paused. An exception: their checksum is not the sender's."""
        await self.start_weight_update()
        await self.update_weights({"checksum": checksum})
        await self._use(version)

    async def start_weight_update(self) -> None:
        await self.engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.engine.update_weights(WeightTransferUpdateRequest(update_info))

    async def leave_transfer(self) -> None:
        """Leave a transfer that broke, and what this engine waits for in it; until the next its weights are of two versions."""
        from actors.weights.leaving import told_to_leave

        self._check_alive()
        with told_to_leave():
            await self.engine.collective_rpc("weight_transfer_leave")

    async def finish_weight_update(self, version: int, checksum: str) -> None:
        """Take the new weights into use as `version`.

        Raises:
            WorkerError: the checksum of what a vLLM worker received is not the sender's. The engine is unusable from then on.
        """
        received = await self.engine.collective_rpc("weight_transfer_digest")
        if set(received) != {checksum}:
            raise WorkerError(f"{self.name} received weights with checksum {received}, the learner sent {checksum}")
        await self._use(version)

    async def _use(self, version: int) -> None:
        self._completions.version = version
        await self.engine.finish_weight_update(str(version))

    async def load_adapter(self, version: int, checksum: str, data: Sequence[Any]) -> float:
        """Take the adapter behind `data` (one reference, on `lora.adapter_bytes`) into use as `version`, without a pause.

        Returns:
            The seconds for which the engine was stalled.

        Raises:
            WorkerError: it arrived with another checksum, or the engine has no room for it.
        """
        self._check_alive()
        return await self._adapters.load(version, checksum, await data[0])

    # Maintenance

    async def stats(self) -> dict[str, float]:
        """Samples, tokens, and busy seconds since the start."""
        busy = self._busy_s + (time.monotonic() - self._busy_since if self._tasks else 0.0)
        return {"samples": self._num_samples, "tokens": self._num_tokens, "busy_s": busy}

    async def shutdown(self) -> None:
        """End the engine's processes."""
        await asyncio.to_thread(self.engine.shutdown, SHUTDOWN_S)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _check_alive(self) -> None:
        if self.engine.errored:
            raise WorkerError(f"{self.name}: {CORE_DIED}; logs/{self.name}.log tells more")

    def _core_pid(self) -> int:
        processes = self.engine.engine_core.resources.engine_manager.processes
        return int(processes[0].pid)
