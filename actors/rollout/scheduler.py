"""vLLM's scheduler, for callers that need samples only when they are finished: their tokens leave the engine together.

vLLM sends every token of every sample by itself, packed in the engine's process, unpacked and counted in the actor's: half the
work of the actor, on cores that small engines share with it. Here tokens wait for the end of their sample, or for `BUNDLE` of
them. A pause sends what waits, so that vLLM labels tokens with the weights that sampled them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

from actors.rollout import routes

BUNDLE = 1024
"""The most outputs of one sample that wait, which bounds their memory in the engine."""


def bundling_scheduler(*, vllm_config: Any, **options: Any) -> Scheduler:
    """The scheduler class for vLLM's `scheduler_cls`."""
    is_async = vllm_config.scheduler_config.async_scheduling
    return (BundlingAsyncScheduler if is_async else BundlingScheduler)(vllm_config=vllm_config, **options)


class _Bundle:
    """Outputs of one request that are still to be sent, and may be merged into one."""

    def __init__(self, client_index: int) -> None:
        self.client_index = client_index
        self._clear()

    def _clear(self) -> None:
        self.size = 0
        self._last: EngineCoreOutput | None = None
        self._prefill_stats: Any = None
        self._routes: list[np.ndarray[Any, Any]] = []
        self._tokens: list[int] = []
        # What `LogprobsLists` holds per token: ids and log-probabilities, the sampled one first, and its rank.
        self._columns: tuple[list[Any], list[Any], list[Any]] = ([], [], [])

    def add(self, output: EngineCoreOutput) -> None:
        self._last = output
        self._prefill_stats = self._prefill_stats or output.prefill_stats
        self.size += 1
        if output.routed_experts is not None:
            self._routes.append(output.routed_experts)
        self._tokens += output.new_token_ids
        if output.new_logprobs is not None:
            ids, logprobs, ranks = self._columns
            ids += output.new_logprobs.logprob_token_ids.tolist()
            logprobs += output.new_logprobs.logprobs.tolist()
            ranks += output.new_logprobs.sampled_token_ranks.tolist()

    def take(self) -> EngineCoreOutput:
        """All outputs merged into one. Only the first describes the prompt, only the last the end."""
        whole = self._last
        assert whole is not None
        whole.prefill_stats = self._prefill_stats
        whole.new_token_ids = self._tokens
        whole.routed_experts = np.concatenate(self._routes) if self._routes else None
        ids, logprobs, ranks = self._columns
        if ids:
            whole.new_logprobs = LogprobsLists(
                np.array(ids, np.int32), np.array(logprobs, np.float32), np.array(ranks, np.int32)
            )
        self._clear()
        return whole


class _Bundling(Scheduler):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._bundles: dict[str, _Bundle] = {}
        """The bundle of each request in progress whose outputs may wait."""
        self._routes = routes.Routes()

    def add_request(self, request: Request) -> None:
        if _may_wait(request):
            self._bundles[request.request_id] = _Bundle(request.client_index)
        super().add_request(request)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, EngineCoreOutputs]:
        if routes.recorder is not None and scheduler_output.total_num_scheduled_tokens > 0:
            self._routes.add(routes.recorder.take(), model_runner_output.req_ids, scheduler_output)
        messages: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for client_index, message in list(messages.items()):
            message.outputs = [sent for output in message.outputs if (sent := self._sent(output)) is not None]
            if not (message.outputs or message.finished_requests or message.scheduler_stats):
                del messages[client_index]
        if self.pause_state != PauseState.UNPAUSED:
            for bundle in self._bundles.values():
                if bundle.size:
                    messages.setdefault(bundle.client_index, EngineCoreOutputs()).outputs.append(bundle.take())
        return messages

    def has_requests(self) -> bool:
        """Whether requests are left, or outputs to send before a pause is complete: one more step sends them, sampling nothing."""
        paused = self.pause_state != PauseState.UNPAUSED
        return bool(super().has_requests() or (paused and any(bundle.size for bundle in self._bundles.values())))

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Request]:
        ended: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in ended:
            self._bundles.pop(request.request_id, None)
            self._routes.forget(request.request_id)
        return ended

    def _sent(self, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """The output to send now, if any."""
        if routes.recorder is not None:
            output.routed_experts = self._routes.take(output.request_id)
            if output.finished:
                self._routes.forget(output.request_id)
        bundle = self._bundles.get(output.request_id)
        if bundle is None:
            return output
        bundle.add(output)
        if output.finished:
            del self._bundles[output.request_id]
        return bundle.take() if output.finished or bundle.size >= BUNDLE else None


class BundlingScheduler(_Bundling):
    """The bundling scheduler on CPUs."""


class BundlingAsyncScheduler(_Bundling, AsyncScheduler):
    """The bundling scheduler where the next step is scheduled before this one is over."""


def _may_wait(request: Request) -> bool:
    """Whether outputs may wait: nobody reads the tokens before the sample is finished. Stop strings are found by the actor, in
    text."""
    params = request.sampling_params
    return (
        params is not None
        and params.output_kind == RequestOutputKind.FINAL_ONLY
        and not params.detokenize
        and params.prompt_logprobs is None
        and not request.resumable
    )
