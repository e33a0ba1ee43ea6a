"""`make bench-learner`: the learner's update beside its bare packed passes, and what the operating system does meanwhile.

    python -m tests.bench.learner [MODEL] [--dtype float32|bfloat16] [--env NAME=VALUE ..]

MODEL is a folder in Hugging Face's layout; without it a random model of 3 M parameters is made. Bare are forward and backward of
the same micro-batches, in a process of their own with as many threads and the same allocator. `cores` are CPU seconds over
seconds; `faults` are page faults a token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from grpo_ray.batch.pack import PackItem
from grpo_ray.types import Sample, TrainBatch, TrainSample, VersionSpan

GROUPS, GROUP_SIZE, PROMPT, COMPLETION = 16, 8, 40, 30
ROUNDS, SKIPPED = 3, 2
"""Updates that are timed, and those before them, which compile kernels and fill caches."""
START_S, UPDATE_S = 300, 900


def config_of(model: str, dtype: str, env: dict[str, str]) -> Any:
    """A run's config with the learner's defaults."""
    from grpo_ray.config.loading import build
    from grpo_ray.config.schema import RunConfig

    values = {
        "num_steps": ROUNDS + SKIPPED,
        "model": {"path": model, "dtype": dtype},
        "data": {"train": {"path": "unused"}, "max_prompt_length": PROMPT},
        "rollout": {"max_completion_length": COMPLETION * 2, "num_generations": GROUP_SIZE},
        "reward": {"functions": [{"name": "accuracy"}]},
        "learner": {"env": env, "learning_rate": 1e-6},
        "deadlines": {"start_s": START_S, "update_s": UPDATE_S},
    }
    return build(RunConfig, values, "bench-learner")


def batch_of(step: int) -> TrainBatch:
    """Groups of samples of random tokens, completions of 15 to 45."""
    import numpy as np

    rng = np.random.default_rng(step)
    rows: list[Sample] = []
    samples: list[TrainSample] = []
    for group in range(GROUPS):
        prompt = rng.integers(8, 200, PROMPT).astype(np.int32)
        for index in range(GROUP_SIZE):
            length = int(rng.integers(COMPLETION // 2, COMPLETION * 3 // 2 + 1))
            name, ids = f"bench/0/{group}", rng.integers(8, 200, length).astype(np.int32)
            logps = np.full(length, -5.0, np.float32)
            rows.append(Sample(name, index, prompt, ids, logps, (VersionSpan(step, 0, length),), "stop", ""))
            advantage = float(rng.standard_normal())
            samples.append(
                TrainSample(rows, len(rows) - 1, name, index, len(prompt), length, group, True, advantage, advantage)
            )
    return TrainBatch(step + 1, samples, 1.0)


def counters(pid: int) -> tuple[float, float]:
    """CPU seconds and minor page faults of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), float(fields[7])


def timed(rounds: Iterator[int], pid: int) -> dict[str, float]:
    """Milliseconds, cores and page faults of the rounds after the first ones; each yields its trained tokens."""
    seconds, tokens = 0.0, 0
    before, started = counters(pid), time.perf_counter()
    for k, num in enumerate(rounds):
        if k == SKIPPED - 1:
            before, started = counters(pid), time.perf_counter()
        elif k >= SKIPPED:
            tokens += num
            seconds = time.perf_counter() - started
    after = counters(pid)
    return {
        "ms": 1000 * seconds / tokens,
        "cpu_ms": 1000 * (after[0] - before[0]) / tokens,
        "cores": (after[0] - before[0]) / seconds,
        "faults": (after[1] - before[1]) / tokens,
    }


def tokens_of(batch: TrainBatch) -> int:
    """What the packed passes compute: each prompt once, and all completions."""
    return GROUPS * PROMPT + sum(s.num_tokens for s in batch.samples)


def as_sum(_rows: slice, logps: Any) -> Any:
    """The slopes of a loss that is the sum of all log-probabilities."""
    return logps.new_ones(len(logps))


def item_of(sample: TrainSample, index: int) -> PackItem:
    row = sample.ref[sample.row]
    return PackItem(row.prompt_token_ids, row.token_ids, row.logprobs, sample.reward, 1.0, index)


def bare(model: str, dtype: str) -> dict[str, float]:
    """The learner's model and micro-batches, without DeepSpeed, an optimizer and Ray."""
    import torch

    from actors.learner.build import _policy, build_objective
    from actors.learner.group import _spec
    from actors.learner.micro_batches import MicroBatchLoader
    from grpo_ray.batch.pack import pack
    from grpo_ray.batch.sequence import Alone
    from grpo_ray.machine import usable_cpus

    torch.set_num_threads(usable_cpus())
    spec = _spec(config_of(model, dtype, {}), model, "", False, None)
    device = torch.device("cpu")
    policy = _policy(spec, device, Alone(), trained=True).to(spec.dtype).train()
    loader = MicroBatchLoader(spec, build_objective(spec), 0, Alone(), device, share_prompts=True)

    def rounds() -> Iterator[int]:
        for step in range(ROUNDS + SKIPPED):
            batch = batch_of(step)
            for planned in loader.plan(batch):
                for micro in planned.ranks[0]:
                    items = [item_of(batch.samples[i], i) for i in micro]
                    policy(pack(items, share_prompts=True), 1.0, None, as_sum)[0].sum().backward()
            yield tokens_of(batch)

    return timed(rounds(), os.getpid())


def in_a_run(model: str, dtype: str, env: dict[str, str]) -> dict[str, float]:
    """The update of a learner with one rank, in its actor."""
    import psutil
    import ray

    from actors.learner.group import LearnerGroup

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with asyncio.Runner() as runner, tempfile.TemporaryDirectory() as folder:
        group = runner.run(LearnerGroup.create(config_of(model, dtype, env), model, folder))
        mine = (p for p in psutil.Process().children(recursive=True) if "LearnerActor" in " ".join(p.cmdline()))
        pid = next(mine).pid

        def rounds() -> Iterator[int]:
            for step in range(ROUNDS + SKIPPED):
                batch = batch_of(step)
                runner.run(group.update(batch))
                yield tokens_of(batch)

        try:
            return timed(rounds(), pid)
        finally:
            runner.run(group.close())
            ray.shutdown()


def measured(what: str, model: str, dtype: str, env: dict[str, str]) -> dict[str, float]:
    """One case, in a process of its own."""
    from actors.learner.group import _env

    command = [sys.executable, "-m", "tests.bench.learner", model, "--dtype", dtype, "--one", what]
    command += [f"--env={name}={value}" for name, value in env.items()]
    around = {**os.environ, "RAY_worker_niceness": "0"}
    around |= _env(config_of(model, dtype, env), on_gpu=False) if what == "bare" else {}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=3600, check=False)
    if done.returncode:
        raise SystemExit(f"{what}, {dtype}, failed:\n{done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def tiny(folder: str) -> str:
    """A random model of 3 M parameters."""
    from grpo_ray.config.model import TinyModelConfig
    from grpo_ray.models.files.tiny import build_tiny_model

    return str(build_tiny_model(Path(folder) / "model", TinyModelConfig(hidden_size=256, num_layers=4, context=256)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.learner", description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--env", action="append", default=[], help="of the learner's process")
    parser.add_argument("--one", choices=("bare", "learner"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    env = dict(pair.split("=", 1) for pair in options.env)
    if options.one:
        run = bare if options.one == "bare" else in_a_run
        arguments = (
            (options.model, options.dtype[0]) if options.one == "bare" else (options.model, options.dtype[0], env)
        )
        print(json.dumps(run(*arguments)))
        return
    table = Table("dtype", "", "ms a token", "factor", "CPU ms a token", "cores", "page faults a token")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or tiny(folder)
        for dtype in options.dtype or ("float32", "bfloat16"):
            alone = measured("bare", model, dtype, env)
            for what, found in (("bare passes", alone), ("learner", measured("learner", model, dtype, env))):
                cells = (found["ms"], found["ms"] / alone["ms"], found["cpu_ms"], found["cores"], found["faults"])
                table.add_row(dtype, what, *(f"{cell:.2f}" for cell in cells))
    table.add_section()
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
