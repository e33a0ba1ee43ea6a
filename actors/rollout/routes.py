"""The experts that tokens take in an engine on CPUs, told by its routers (`rollout.keep_routing`).

    routers of the worker -> Recorder -> scheduler: Routes -> EngineCoreOutput.routed_experts -> CompletionOutput.routed_experts

Worker and scheduler of such an engine are one process. On GPUs vLLM does all of it (`enable_return_routed_experts`), by its second
model runner, whose kernels are Triton's.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from actors.weights.backend import TransferExtension


class Recorder:
    """What the routers of this process's model chose, step by step."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int) -> None:
        self._shape = (num_layers, top_k)
        self._dtype = np.uint8 if num_experts <= 256 else np.uint16
        self._steps: deque[NDArray[np.integer]] = deque()
        self._first: int | None = None
        """The first layer with a router: with it begins a step."""

    def record(self, layer: int, experts_nk: Tensor) -> None:
        if self._first is None or layer == self._first:
            self._first = layer
            self._steps.append(np.zeros((len(experts_nk), *self._shape), self._dtype))
        self._steps[-1][:, layer] = experts_nk.numpy()

    def take(self) -> NDArray[np.integer]:
        """[n, L, k] of the oldest step that was not taken yet."""
        return self._steps.popleft()


recorder: Recorder | None = None
"""The recorder of this process; None: its routers tell nothing."""


class Routes:
    """The routes of the requests in progress, kept until an output takes them along."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}
        """The number of tokens of each request whose routes are known; what is computed again after a pause is no news."""
        self._waiting: dict[str, list[NDArray[np.integer]]] = {}

    def add(self, routes_nLk: NDArray[np.integer], request_ids: list[str], scheduled: Any) -> None:
        """Add those of a step.

        Args:
            request_ids: the requests in the order of their rows.
            scheduled: vLLM's `SchedulerOutput`.
        """
        starts = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        row = 0
        for request_id in request_ids:
            start, num = starts[request_id], scheduled.num_scheduled_tokens[request_id]
            known = self._known.get(request_id, 0)
            news = routes_nLk[row + max(known - start, 0) : row + num]
            self._waiting.setdefault(request_id, []).append(news)
            self._known[request_id] = max(known, start + num)
            row += num

    def take(self, request_id: str) -> NDArray[np.integer] | None:
        waiting = self._waiting.pop(request_id, None)
        return np.concatenate(waiting) if waiting else None

    def forget(self, request_id: str) -> None:
        self._known.pop(request_id, None)
        self._waiting.pop(request_id, None)


class Routed:
    """The methods mixed into vLLM's worker (`worker_extension_cls`) where routes are kept on CPUs."""

    model_runner: Any
    vllm_config: Any

    def keep_routes(self) -> None:
        """Let the routers tell what they choose.

        Raises:
            ValueError: the model has no experts, or a router that tells nothing.
        """
        from vllm.model_executor.layers.fused_moe.layer import MoERunner
        from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

        global recorder
        model = self.vllm_config.model_config
        layers = [module for module in self.model_runner.model.modules() if isinstance(module, MoERunner)]
        deaf = [layer for layer in layers if not isinstance(layer.router, BaseRouter)]
        if not layers or deaf:
            what = f"router {type(deaf[0].router).__name__}" if deaf else "model without experts"
            raise ValueError(f"rollout.keep_routing: vLLM has a {what} here, which tells no experts; leave it out")
        recorder = Recorder(
            model.get_total_num_hidden_layers(), model.get_num_experts(), model.get_num_experts_per_tok()
        )
        for layer in layers:
            layer.router.set_capture_fn(partial(recorder.record, layer.layer_id))


class RoutedTransfers(TransferExtension, Routed):
    """Both extensions: of an engine that receives whole weights."""
