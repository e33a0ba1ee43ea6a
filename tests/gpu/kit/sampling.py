"""Tokens/s of bare vLLM by its scheduler and by ours, with CUDA graphs, over the sequences and tokens of a step.

python -m tests.gpu.kit.sampling SCHEDULER SEQS TOKENS     SCHEDULER: ours or vllm
"""

from __future__ import annotations

import sys
import time

from tests.gpu.kit.engine import engine_options
from tests.gpu.kit.figures import ON_GPU, noting

PROMPTS, COMPLETION = (512, 1024) if ON_GPU else (8, 16)


def main(scheduler: str, seqs: str, tokens: str) -> None:
    with noting("sampling", scheduler=scheduler, seqs=int(seqs), step_tokens=int(tokens)) as found:
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        args = engine_options(max_num_seqs=int(seqs), max_num_batched_tokens=int(tokens))
        if scheduler == "vllm":
            args.scheduler_cls = None
        started = time.monotonic()
        engine = LLMEngine.from_engine_args(args)
        found["start_s"] = time.monotonic() - started
        for number in range(PROMPTS):
            params = SamplingParams(
                seed=number,
                max_tokens=COMPLETION,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = {"prompt_token_ids": [10 + (number * 7 + k * 3) % 60 for k in range(64)]}
            engine.add_request(str(number), prompt, params)
        started, count = time.monotonic(), 0
        while engine.has_unfinished_requests():
            count += sum(len(output.outputs[0].token_ids) for output in engine.step())
        found["tokens_per_s"] = count / (time.monotonic() - started)


if __name__ == "__main__":
    main(*sys.argv[1:])
