"""Run by test_weight_shadow in a process of its own: what an engine samples after each of several swaps, and what fresh engines do.

python -m tests.actors.weights.shadowed DTYPE eager|compiled MODEL MODEL MODEL ..   a line of JSON for every three models
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from safetensors.torch import load_file

from actors.rollout.vllm_options import engine_args
from actors.weights.shadow import Loader, Shadow, WhenPaused
from grpo_ray.config.rollout import RolloutConfig

ORDER = (1, 2, 2, 1, 0)
"""Weights of these models in turn: each lands in either set of memory."""
PAUSED = (1, 2)
"""After those, loaded while nothing is sampled, as on a GPU."""
BETWEEN_S = 0.01
"""Two weights."""


def main(dtype: str, mode: str, *models: str) -> None:
    for at in range(0, len(models), 3):
        print(json.dumps(seen_of(models[at : at + 3], dtype, mode)), flush=True)


def seen_of(models: tuple[str, ...], dtype: str, mode: str) -> dict[str, Any]:
    engine = start(models[0], dtype, mode)
    found: list[Any] = []
    engine.apply_model(found.append)
    model, config = found[0], engine.vllm_config.model_config
    refused = refusal_of(Shadow(model, config), models[1])
    shadow, when_paused = Shadow(model, config), WhenPaused(model, config)
    swapped = []
    draws_beside = 0
    loads: list[tuple[Shadow | WhenPaused, int]] = [(shadow, number) for number in ORDER]
    loads += [(when_paused, number) for number in PAUSED]
    for loader, number in loads:
        before = draw(engine)
        loading = threading.Thread(target=loader.load, args=(slowly(models[number]),))
        loading.start()
        while loading.is_alive():
            draws_beside += 1
            assert draw(engine) == before
        assert draw(engine) == before
        loader.swap()
        swapped.append(draw(engine))
    pairs = [
        (name, live.data_ptr() == shadow._twins[module].get_buffer(name).data_ptr())
        for module in model.modules()
        for name, live in module._buffers.items()
        if live is not None
    ]
    return {
        "swapped": swapped,
        "fresh": [draw(start(folder, dtype, mode)) for folder in models],
        "refused": refused,
        "draws_beside": draws_beside,
        "shared_buffers": sorted({name for name, shared in pairs if shared}),
    }


def refusal_of(loader: Loader, model: str) -> str:
    """What is said of weights of which the last has another shape."""
    *weights, (name, last) = load_file(f"{model}/model.safetensors").items()
    try:
        loader.load([weights, [(name, last[:-1])]])
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def start(model: str, dtype: str, mode: str) -> Any:
    from vllm.v1.engine.llm_engine import LLMEngine

    config = RolloutConfig(max_completion_length=64, max_num_seqs=8, kv_cache_gb=0.05, enforce_eager=mode == "eager")
    return LLMEngine.from_engine_args(engine_args(config, model, dtype, 128, 1, "gloo", trust_remote_code=False))


def slowly(model: str) -> Iterator[list[tuple[str, Any]]]:
    for pair in load_file(f"{model}/model.safetensors").items():
        time.sleep(BETWEEN_S)
        yield [pair]


def draw(engine: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities of eight seeded samples."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    engine.reset_prefix_cache()
    for seed in range(8):
        params = SamplingParams(seed=seed, max_tokens=24, logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(str(seed), {"prompt_token_ids": [10 + (seed * 7 + k * 3) % 80 for k in range(20)]}, params)
    samples = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            (completion,) = output.outputs
            of_each = zip(completion.logprobs, completion.token_ids, strict=True)
            samples[output.request_id] = (list(completion.token_ids), [at[token].logprob for at, token in of_each])
    return [samples[key] for key in sorted(samples)]


if __name__ == "__main__":
    main(*sys.argv[1:])
