"""Run by test_engine_scheduler in a process of its own: vLLM's engine core with the next step scheduled before this one is over, as
on GPUs, over an executor whose model is arithmetic; by vLLM's scheduler or by ours, as JSON.

python -m tests.actors.rollout.ahead MODEL MAX_TOKENS [BUNDLE]
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

import actors.rollout.scheduler
from actors.rollout.vllm_options import engine_args
from grpo_ray.config.rollout import RolloutConfig
from tests.actors.rollout.bundled import told

ABORTED, ABORT_AT = "3", 5
PAUSED_AT = (9, 23)


class Arithmetic(Executor):
    """A model whose token is a function of the request and the position."""

    def _init_executor(self) -> None:
        self.prompts: dict[str, int] = {}
        self.sampled: dict[str, int] = {}
        self._scheduled: Any = None

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_health(self) -> None:
        pass

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        answers: dict[str, Any] = {
            "get_kv_cache_spec": {
                "layer": FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
            },
            "get_supported_kv_cache_layouts": ["NHD", "HND"],
            "determine_available_memory": 64 << 20,
        }
        if method == "compile_or_warm_up_model":
            return []
        return [answers.get(method)]

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        self._scheduled = scheduler_output
        nothing = scheduler_output.total_num_scheduled_tokens == 0
        return _later(ModelRunnerOutput([], {}) if nothing else None)

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        scheduled = self._scheduled
        self.prompts |= {new.req_id: len(new.prompt_token_ids) for new in scheduled.scheduled_new_reqs}
        ids = list(scheduled.num_scheduled_tokens)
        tokens = []
        for request in ids:
            place = self.sampled[request] = self.sampled.get(request, -1) + 1
            tokens.append(10 + (int(request.split("-")[0]) * 31 + place * 17) % 80)
        column = np.array(tokens, np.int32)[:, None]
        logprobs = LogprobsLists(column, -0.01 * column.astype(np.float32), column[:, 0] % 7)
        return _later(
            ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, [[t] for t in tokens], logprobs=logprobs)
        )


def _later(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def main(model: str, max_tokens: str, bundle: str = "") -> None:
    config = RolloutConfig(max_completion_length=64, max_num_seqs=8, kv_cache_gb=0.05)
    args = engine_args(config, model, "float32", 128, 1, "gloo", trust_remote_code=False)
    if bundle:
        actors.rollout.scheduler.BUNDLE = int(bundle)
    else:
        args.scheduler_cls = None
    settings = args.create_engine_config()
    settings.scheduler_config.async_scheduling = True
    engine = LLMEngine(settings, Arithmetic, log_stats=False)
    core: Any = engine.engine_core.engine_core
    scheduler, executor = core.scheduler, core.model_executor
    sent: dict[str, list[int]] = {}
    update = scheduler.update_from_output

    def noted(*of_step: Any) -> Any:
        messages = update(*of_step)
        for output in (o for message in messages.values() for o in message.outputs):
            sent.setdefault(output.request_id, []).append(len(output.new_token_ids))
        return messages

    scheduler.update_from_output = noted
    for number in range(12):
        params = SamplingParams(
            seed=number,
            max_tokens=int(max_tokens) - 3 * number,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = [10 + (number * 7 + k * 3) % 80 for k in range(20)]
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    samples: dict[str, Any] = {}
    at_pauses = []

    def step() -> None:
        for output in engine.step():
            (completion,) = output.outputs
            samples[output.request_id] = told(completion)

    number = 0
    while engine.has_unfinished_requests():
        if number == ABORT_AT:
            engine.abort_request([ABORTED])
        if number in PAUSED_AT:
            scheduler.set_pause_state(PauseState.PAUSED_ALL)
            # Until the engine is idle, as the core's process waits before it answers.
            while scheduler.has_requests() or core.batch_queue:
                step()
            left = [r for r in executor.sampled if r in scheduler.requests]
            at_pauses.append([[executor.sampled[r] + 1, sum(sent.get(r, []))] for r in left])
            scheduler.set_pause_state(PauseState.UNPAUSED)
        step()
        number += 1
    print(
        json.dumps(
            {
                "scheduler": type(scheduler).__mro__[0].__name__,
                "ahead": core.batch_queue_size,
                "samples": samples,
                "messages": sum(len(m) for m in sent.values()),
                "at_pauses": at_pauses,
                "waiting": len(scheduler._bundles) if bundle else 0,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
