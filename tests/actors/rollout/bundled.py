"""Run by test_engine_scheduler in a process of its own: what a real engine draws, by vLLM's scheduler or by ours, as JSON.

python -m tests.actors.rollout.bundled MODEL MAX_TOKENS [BUNDLE [OPTIONS]]     OPTIONS: of rollout, as JSON
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

import actors.rollout.scheduler
from actors.rollout.vllm_options import engine_args
from grpo_ray.config.rollout import RolloutConfig

ABORTED, ABORT_AT = "3", 5
"""One of those that the engine starts with, before it can be finished."""


REPEATED = [10 + k % 80 for k in range(40)]
"""A prompt longer than a block of the cache."""


def cached(engine: LLMEngine) -> int:
    """The tokens of a prompt that the cache has when it comes for the second time."""
    found = 0
    for number in ("first", "second"):
        engine.add_request(number, {"prompt_token_ids": REPEATED}, SamplingParams(max_tokens=1, detokenize=False))
        while engine.has_unfinished_requests():
            found = next((output.num_cached_tokens or 0 for output in engine.step()), found)
    return found


def told(completion: Any) -> dict[str, Any]:
    """What vLLM has sampled, as JSON."""
    return {
        "tokens": list(completion.token_ids),
        "logprobs": list(completion.logprobs.logprobs),
        "ranks": list(completion.logprobs.ranks),
        "reason": completion.finish_reason,
    }


def main(model: str, max_tokens: str, bundle: str = "", options: str = "{}") -> None:
    config = RolloutConfig(max_completion_length=64, max_num_seqs=8, kv_cache_gb=0.05, **json.loads(options))
    args = engine_args(config, model, "float32", 128, 1, "gloo", trust_remote_code=False)
    if bundle:
        actors.rollout.scheduler.BUNDLE = int(bundle)
    else:
        args.scheduler_cls = None
    engine = LLMEngine.from_engine_args(args)
    scheduler: Any = engine.engine_core.engine_core.scheduler
    sent: list[str] = []
    update = scheduler.update_from_output

    def noted(*of_step: Any) -> Any:
        messages = update(*of_step)
        sent.extend(output.request_id.split("-")[0] for message in messages.values() for output in message.outputs)
        return messages

    scheduler.update_from_output = noted
    for number in range(12):
        params = SamplingParams(
            seed=number,
            max_tokens=int(max_tokens),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(
            str(number), {"prompt_token_ids": [10 + (number * 7 + k * 3) % 80 for k in range(20)]}, params
        )
    samples = {}
    for step in itertools.count():
        if step == ABORT_AT:
            engine.abort_request([ABORTED])
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            (completion,) = output.outputs
            samples[output.request_id] = told(completion) | {
                "cumulative": completion.cumulative_logprob,
                "cached": output.num_cached_tokens,
            }
    messages = {number: sent.count(number) for number in samples}
    waiting = len(scheduler._bundles) if bundle else 0
    print(json.dumps({"samples": samples, "messages": messages, "waiting": waiting, "cached": cached(engine)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
