"""`make bench-gpu`: a run on one shared GPU, and bare vLLM with the same engine settings and prompts. Any Nvidia GPU with 40 GB.

python -m tests.bench.gpu [key=value ...]      e.g. rollout.max_num_seqs=256
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

RECIPE = "tests/bench/gpu.yaml"
FOLDER = Path("runs/bench-gpu")
SKIPPED = 3
"""First steps, which compile kernels and fill caches."""
RUN_LIMIT_S, BARE_LIMIT_S = 3600.0, 1200.0


def main() -> None:
    if sys.argv[1:] == ["--bare"]:
        print(json.dumps(bare_sampling()))
        return
    overrides = sys.argv[1:]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.getenv("PYTHONPATH")]))}
    shutil.rmtree(FOLDER, ignore_errors=True)
    train = [sys.executable, "-m", "launch", "train", RECIPE, f"name={FOLDER.name}", *overrides]
    subprocess.run(train, check=True, timeout=RUN_LIMIT_S, env=env)
    bare = [sys.executable, "-m", "tests.bench.gpu", "--bare"]
    out = subprocess.run(bare, check=True, timeout=BARE_LIMIT_S, env=env, stdout=subprocess.PIPE, text=True).stdout
    lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    _print([line for line in lines if "time/step" in line][SKIPPED:], json.loads(out.splitlines()[-1]))


def bare_sampling() -> dict[str, float]:
    """Tokens a second of the engine alone, over the prompts of the steps that were counted."""
    from actors.rollout.vllm_options import engine_args, rollout_env
    from actors.weights.sync import resolve_backend
    from grpo_ray.config.schema import RunConfig
    from launch.run.recipe import load_run_config

    config = load_run_config(RunConfig, FOLDER / "config.yaml")
    on_gpu = Path("/dev/nvidia0").exists()
    backend = resolve_backend(config, has_gpus=on_gpu)
    os.environ.update(rollout_env(config.rollout, on_gpu=on_gpu, backend=backend))
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    from grpo_ray.data.prompts import load_prompts
    from grpo_ray.models.files.loading import load_tokenizer

    model = str(FOLDER / "model")
    length = config.data.max_prompt_length + config.rollout.max_completion_length
    args = engine_args(
        config.rollout, model, config.model.dtype, length, config.seed, backend, trust_remote_code=False, colocated=True
    )
    args.scheduler_cls = None  # vLLM's own.
    engine = LLMEngine.from_engine_args(args)
    prompts = load_prompts(
        config.data, load_tokenizer(model, trust_remote_code=False), seed=config.seed, max_context=length
    ).train
    per_step, group = config.prompts_per_step, config.rollout.num_generations
    tokens, seconds = [], []
    assert config.num_steps is not None
    for step in range(SKIPPED, config.num_steps):
        started, count = time.monotonic(), 0
        for row in range(per_step * step, per_step * (step + 1)):
            ids = prompts.item(row % len(prompts), 0).token_ids
            for index in range(group):
                params = SamplingParams(
                    max_tokens=config.rollout.max_completion_length,
                    seed=row * group + index,
                    logprobs=0,
                    flat_logprobs=True,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                engine.add_request(f"{row}-{index}", {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            count += sum(len(o.outputs[0].token_ids) for o in engine.step())
        tokens.append(count)
        seconds.append(time.monotonic() - started)
    return {"tokens_per_s": sum(tokens) / sum(seconds)}


def _print(lines: list[dict[str, Any]], bare: dict[str, float]) -> None:
    through = sum(m["rollout/0/tokens"] for m in lines) / sum(m["rollout/0/busy_s"] for m in lines)
    rows = {
        "seconds a step": f"{median(m['time/step'] for m in lines):.2f}",
        "sampling, tokens/s while the engine has work": f"{through:,.0f}",
        "bare vLLM, tokens/s": f"{bare['tokens_per_s']:,.0f}",
        "ratio": f"{through / bare['tokens_per_s']:.2f}",
        "learner, tokens/s": f"{median(m['tokens/processed'] / m['time/update'] for m in lines):,.0f}",
        "learner, MFU": f"{median(m['throughput/mfu'] for m in lines):.1%}" if "throughput/mfu" in lines[0] else "",
        "seconds of a weight sync": f"{median(m['time/sync'] for m in lines):.2f}",
        "mean difference of log-probabilities": f"{max(m['mismatch/mean_abs'] for m in lines):.1e}",
    }
    out = Table("", "", title="Qwen2.5-1.5B's shape, colocated on one device")
    for name, value in rows.items():
        out.add_row(name, value)
    Console().print(out)


if __name__ == "__main__":
    main()
