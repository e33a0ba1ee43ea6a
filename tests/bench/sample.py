"""`grpo-ray sample` against bare vLLM: the same engine options, prompts and seeds, tokens a second once engines run.

make bench-sample    alternating, three repeats each (ten minutes on two cores)

All have one engine of one thread. vLLM's own `LLM` runs it in a process beside the caller's by default, as every `AsyncLLM` does.
`grpo-ray sample` also scores every sample in a process of its own and writes Parquet.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

PROMPTS, K, TOKENS, REPEATS = 1500, 4, 64, 3
MODEL: dict[str, Any] = {
    "hidden_size": 320,
    "num_layers": 2,
    "num_heads": 10,
    "num_kv_heads": 2,
    "context": 128,
    "seed": 1,
}
DATA: dict[str, Any] = {
    "path": "reasoning_gym:chain_sum",
    "args": {"size": PROMPTS, "seed": 5, "min_terms": 2, "max_terms": 2},
    "columns": {"prompt": "metadata.expression"},
}
OURS = "grpo-ray sample"
BARE = {"bare vLLM, engine in its own process": "own-process", "bare vLLM, engine in the caller's": "in-process"}
ROLLOUT: dict[str, Any] = {"max_completion_length": TOKENS, "max_num_seqs": 256, "kv_cache_gb": 0.25}


def main() -> None:
    if sys.argv[1:2] == ["bare"]:
        _bare(Path(sys.argv[2]), own_process=sys.argv[3] == "own-process")
        return
    from grpo_ray.config.model import TinyModelConfig
    from grpo_ray.models.files.tiny import build_tiny_model

    speeds: dict[str, list[float]] = {name: [] for name in (*BARE, OURS)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = build_tiny_model(folder / "model", TinyModelConfig(**MODEL))
        for repeat in range(REPEATS):
            for name, where in BARE.items():
                speeds[name].append(_run("tests.bench.sample", "bare", str(model), where))
            speeds[OURS].append(_run("launch", *_ours(folder, model, repeat)))
            print({name: [round(v) for v in values] for name, values in speeds.items()}, flush=True)
    ours = statistics.median(speeds[OURS])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"{name:40} {median:8,.0f} tokens/s, median of {REPEATS}; {OURS} has {ours / median:.0%} of it")


def _ours(folder: Path, model: Path, repeat: int) -> list[str]:
    recipe = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": DATA, "template": "chat", "max_prompt_length": 48},
        "rollout": ROLLOUT,
        "reward": {"num_cpus": 0, "functions": [{"name": "reasoning_gym", "args": {"strict": True}}]},
        "sample": {"num_samples": K},
    }
    path = folder / "sample.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["sample", str(path), f"dir={folder}", f"name=run-{repeat}"]


def _run(module: str, *args: str) -> float:
    """Tokens a second, as its output says."""
    result = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, check=False)
    found = re.search(r"\(([\d.]+) tokens/s\)", result.stdout.replace("\n", " "))
    if result.returncode or found is None:
        sys.exit(f"{module} {' '.join(args)} failed:\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}")
    return float(found[1])


def _bare(model: Path, *, own_process: bool) -> None:
    """An engine with the options of `actors/rollout/vllm_options.py`, in this process."""
    from grpo_ray.config.data import DataConfig
    from grpo_ray.config.rollout import RolloutConfig

    config = RolloutConfig(**ROLLOUT)
    from actors.rollout.vllm_options import engine_args, rollout_env

    # The actor says the latter for so small a vocabulary.
    os.environ.update(rollout_env(config, on_gpu=False, backend="gloo") | {"TORCH_COMPILE_DISABLE": "1"})
    import torch
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    from grpo_ray.data.prompts import load_prompts
    from grpo_ray.models.files.loading import load_tokenizer
    from grpo_ray.seeds import sample_seed

    torch.set_num_threads(1)
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    data = DataConfig.model_validate({"train": DATA, "template": "chat", "max_prompt_length": 48})
    prompts = list(load_prompts(data, tokenizer, seed=1).train)
    args = engine_args(config, str(model), "float32", 48 + TOKENS, 1, "gloo", trust_remote_code=False)
    args.scheduler_cls = None  # vLLM's own.
    engine = LLMEngine.from_engine_args(args, enable_multiprocessing=own_process)
    began, ids = time.monotonic(), itertools.count()
    for prompt in prompts:
        for i in range(K):
            params = SamplingParams(
                temperature=1.0,
                max_tokens=TOKENS,
                seed=sample_seed(1, prompt.id, i),
                detokenize=False,
                logprobs=0,
                flat_logprobs=True,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(next(ids)), {"prompt_token_ids": prompt.token_ids}, params)
    tokens = 0
    while engine.has_unfinished_requests():
        tokens += sum(len(o.outputs[0].token_ids) for o in engine.step())
    seconds = time.monotonic() - began
    print(f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s)")


if __name__ == "__main__":
    main()
