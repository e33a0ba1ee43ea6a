"""What the hardware allows, one core and one thread each: bare sampling of a step's completions, bare passes over them.

    python -m tests.bench.versus_bound sampling|sampling-alike|packed|padded TASK MODEL STEPS OUT

No trainer, no scores, no optimizer, no weight sync. Overlapped on two cores a step can't be faster than the slower of the two,
as long as the learner works on every sample: groups whose rewards are all equal need no pass, and the bound leaves none out.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.addition import TASKS, right_completions, rows
from tests.bench.versus_steps import StepLog

PROMPTS, GROUP = 32, 8


def main() -> None:
    what, task, model, steps, out = sys.argv[1:]
    makers = {"sampling": _sampling, "sampling-alike": _sampling_alike, "packed": _packed, "padded": _padded}
    step = makers[what](task, model)
    log = StepLog(Path(out))
    for k in range(int(steps)):
        log.step(k + 1, step(slice(PROMPTS * k, PROMPTS * (k + 1))))
    log.close()


def _sampling(task: str, model: str) -> Callable[[slice], int]:
    """In this process and without seeds, which is the fastest."""
    return _engine_step(task, model, alike=False)


def _sampling_alike(task: str, model: str) -> Callable[[slice], int]:
    """As the trainer has it sampled: the engine in a process of its own, a seed for every sample."""
    return _engine_step(task, model, alike=True)


def _engine_step(task: str, model: str, *, alike: bool) -> Callable[[slice], int]:
    """The engine with the options of `actors/rollout/vllm_options.py`."""
    from grpo_ray.config.rollout import RolloutConfig

    t = TASKS[task]
    config = RolloutConfig(max_completion_length=t.max_completion_length, max_num_seqs=PROMPTS * GROUP, kv_cache_gb=1)
    from actors.rollout.vllm_options import engine_args, rollout_env

    os.environ.update(rollout_env(config, on_gpu=False, backend="gloo"))
    if alike:
        # The actor says so for a vocabulary this small.
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    torch.set_num_threads(1)
    length = t.max_prompt_length + t.max_completion_length
    args = engine_args(config, model, "float32", length, 1, "gloo", trust_remote_code=False)
    args.scheduler_cls = None  # vLLM's own.
    engine = LLMEngine.from_engine_args(args, enable_multiprocessing=alike)
    prompts, ids = _prompt_ids(task, model), itertools.count()

    def step(part: slice) -> int:
        for prompt in prompts[part]:
            for _ in range(GROUP):
                number = next(ids)
                params = SamplingParams(
                    temperature=1.0,
                    max_tokens=t.max_completion_length,
                    seed=number if alike else None,
                    detokenize=False,
                    logprobs=0,
                    flat_logprobs=True,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        tokens = 0
        while engine.has_unfinished_requests():
            tokens += sum(len(o.outputs[0].token_ids) for o in engine.step())
        return tokens

    return step


def _packed(task: str, model: str) -> Callable[[slice], int]:
    from grpo_ray.models.memory.estimate import chunk_rows
    from tests.bench.passes import packed_pass, policy

    ours = policy(model, chunk=1)
    ours.chunk = chunk_rows(ours.hf.config.vocab_size, on_gpu=False)
    return _passes(task, model, lambda prompt, lengths: packed_pass(ours, prompt, lengths, group_size=GROUP))


def _padded(task: str, model: str) -> Callable[[slice], int]:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.bench.passes import padded_pass

    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    return _passes(task, model, lambda prompt, lengths: padded_pass(hf, prompt, lengths))


def _passes(task: str, model: str, run: Callable[[int, list[int]], None]) -> Callable[[slice], int]:
    """Over samples as long as the right completions of the step's prompts; every prompt of a task has the same length."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (prompt,) = {len(ids) for ids in _prompt_ids(task, model)}
    completions = [len(ids) + 1 for ids in tokenizer(right_completions(task), add_special_tokens=False).input_ids]

    def step(part: slice) -> int:
        lengths = [n for n in completions[part] for _ in range(GROUP)]
        run(prompt, [prompt + n for n in lengths])
        return sum(lengths)

    return step


def _prompt_ids(task: str, model: str) -> list[Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        for row in rows(task, "train")
    ]


if __name__ == "__main__":
    main()
