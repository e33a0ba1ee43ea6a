"""`make bench-side-by-side`: GRPO, PPO and DPO on the smoke task, from one cold start, with the same number of samples.

    python -m tests.bench.side_by_side [--cold-start MODEL] [--seeds 1 2 3] [--only dpo]

GRPO and PPO sample 32 prompts x 8 a step, for 70 steps. DPO gets as many samples, all of the cold start: a right and a wrong answer
to one prompt are a pair. Each model is tested on the same 1,808 prompts, never trained on, one sample each at T = 1. A row
that is there already (`runs/side-by-side/rows.jsonl`) is not run again: a bench that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from grpo_ray.run.sample_files import read_samples
from tests.bench.learning import ALGORITHMS, cold_start
from tests.bench.versus_steps import read_steps
from tests.bench.watch import Watched, watch

FOLDER = Path("runs/side-by-side")
ROWS = FOLDER / "rows.jsonl"
LIMIT_S = 3600.0
STEPS, PROMPTS_PER_STEP, GROUP = 70, 32, 8
TRAINED_ON = {"size": 8192, "seed": 10000000}
"""As the smoke recipe says."""
HELD_OUT = {"size": 3000, "seed": 90000000}
"""Of these, what is not among them: 1,808."""
PAIRS_PER_PROMPT = 4
NAMES = ("grpo", "ppo", "dpo")
DPO: dict[str, Any] = {
    "num_epochs": 2,
    "examples_per_step": 64,
    "max_length": 96,
    "model": {"dtype": "float32"},
    "data": {"template": "chat"},
    "dpo": {"beta": 0.1},
    "learner": {
        "num_cpus": 1,
        "num_threads": 1,
        "zero_stage": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "adam_betas": [0.9, 0.99],
        "micro_batch_tokens": 4096,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cold-start", help="a model; made by `grpo-ray sft smoke_sft` when not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--only", choices=NAMES, nargs="+", default=list(NAMES))
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    model = options.cold_start or cold_start()
    for seed in options.seeds:
        for name in options.only:
            _row(name, seed, model)
    _print(model)


def _row(name: str, seed: int, model: str) -> None:
    if any((row["name"], row["seed"]) == (name, seed) for row in _rows()):
        return
    run = Path("runs") / f"side-by-side-{name}-{seed}"
    parts = _direct(run, seed, model) if name == "dpo" else [_online(name, run, seed, model)]
    row = {
        "name": name,
        "seed": seed,
        "accuracy": _accuracy(run / "hf", f"{run.name}-tested"),
        "seconds": sum(part.seconds for part in parts),
        "peak_mib": max(part.peak_bytes for part in parts) / 2**20,
        "learner_mib": max(part.peak_learner_bytes for part in parts) / 2**20,
    }
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _online(name: str, run: Path, seed: int, model: str) -> Watched:
    """Samples, and learns from what it sampled."""
    options = [f"name={run.name}", f"seed={seed}", f"num_steps={STEPS}", f"model.path={model}", "learner.num_threads=1"]
    return _grpo_ray(run, "train", "smoke", *options, "data.eval=null", *ALGORITHMS[name])


def _direct(run: Path, seed: int, model: str) -> list[Watched]:
    """Samples once, pairs right answers with wrong ones, and learns from the pairs."""
    samples = run.with_name(f"{run.name}-samples")
    prompts = TRAINED_ON | {"size": STEPS * PROMPTS_PER_STEP}
    sampled = _sample(samples, model, seed, GROUP, *_args("train", prompts), "data.eval=null")
    pairs = FOLDER / f"pairs-{seed}.jsonl"
    rows = _pairs(samples / "samples")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = FOLDER / "dpo.yaml"
    recipe.write_text(yaml.safe_dump(DPO))
    options = [f"name={run.name}", f"seed={seed}", f"model.path={model}", f"data.train.path={pairs}"]
    return [sampled, _grpo_ray(run, "dpo", str(recipe), *options)]


def _pairs(samples: Path) -> list[dict[str, Any]]:
    """Of each prompt the first right answers with the first wrong ones, each once."""
    answers: dict[str, tuple[Any, list[str], list[str]]] = {}
    for row in read_samples(samples):
        if row["finish_reason"] == "stop":
            right = row["rewards"][0]["value"] == 1
            answers.setdefault(row["prompt_id"], (row["messages"], [], []))[1 if right else 2].append(row["completion"])
    return [
        {"prompt": prompt, "chosen": _said(chosen), "rejected": _said(rejected)}
        for prompt, right, wrong in answers.values()
        for chosen, rejected, _ in zip(right, wrong, range(PAIRS_PER_PROMPT), strict=False)
    ]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _accuracy(model: Path, name: str) -> float:
    folder = Path("runs") / name
    # What is to evaluate on never comes up in what is sampled.
    _sample(folder, str(model), 1, 1, *_args("train", HELD_OUT), *_args("eval", TRAINED_ON))
    values = (row["rewards"][0]["value"] for row in read_samples(folder / "samples"))
    return mean(value for value in values if value is not None)


def _sample(folder: Path, model: str, seed: int, num_samples: int, *data: str) -> Watched:
    options = [f"name={folder.name}", f"seed={seed}", f"model.path={model}", f"sample.num_samples={num_samples}"]
    return _grpo_ray(folder, "sample", "smoke", *options, *data)


def _args(part: str, args: dict[str, int]) -> list[str]:
    return [f"data.{part}.args.{key}={value}" for key, value in args.items()]


def _grpo_ray(run: Path, *args: str) -> Watched:
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "launch", *args]
    return watch(
        command,
        steps=lambda: read_steps(run / "metrics.jsonl"),
        log=FOLDER / "last.log",
        limit_s=LIMIT_S,
        env={},
    )


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def _print(model: str) -> None:
    rows = _rows()
    before = _accuracy(Path(model), "side-by-side-tested")
    samples = STEPS * PROMPTS_PER_STEP * GROUP
    out = Table(
        "",
        "seeds",
        "held-out accuracy",
        "seconds, start included",
        "learner, MiB at the peak",
        "all processes, MiB",
        title=f"the smoke task, {samples:,} samples, from {before:.1%}",
    )
    learner = {}
    for name in NAMES:
        if not (of := [row for row in rows if row["name"] == name]):
            continue
        learner[name] = max(row["learner_mib"] for row in of)
        out.add_row(
            name,
            ", ".join(str(row["seed"]) for row in of),
            ", ".join(f"{row['accuracy']:.1%}" for row in of),
            ", ".join(f"{row['seconds']:.0f}" for row in of),
            f"{learner[name]:,.0f}",
            f"{max(row['peak_mib'] for row in of):,.0f}",
        )
        if name == "ppo" and "grpo" in learner:
            out.add_row("  its value model, over grpo", "", "", "", f"{learner['ppo'] - learner['grpo']:,.0f}", "")
    Console(width=120).print(out)


if __name__ == "__main__":
    main()
