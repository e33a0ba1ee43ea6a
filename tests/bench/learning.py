"""`make bench-learning`: the smoke task by each algorithm from one cold start; the table of the README. Minutes a row.

python -m tests.bench.learning [--cold-start MODEL] [--seeds 1 2 3] [--only dapo ppo]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

GOAL = 0.85
ALGORITHMS = {
    "grpo": ["algorithm={preset: grpo, beta: 0}"],
    "dr_grpo": ["algorithm=dr_grpo"],
    "dapo": ["algorithm=dapo"],
    "gspo": ["algorithm=gspo"],
    "cispo": ["algorithm=cispo"],
    "rloo": ["algorithm=rloo"],
    # Two optimizer steps a batch, so half the rate; the critic starts from the policy and learns faster than it.
    "ppo": ["algorithm=ppo", "critic.learning_rate=5e-4", "learner.learning_rate=1.5e-4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cold-start", help="a model; made by `grpo-ray sft smoke_sft` when not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    options = parser.parse_args()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    model = options.cold_start or f"runs/learning-{stamp}-sft/hf"
    if options.cold_start is None:
        _grpo_ray("sft", "smoke_sft", f"name=learning-{stamp}-sft")
    table = Table(
        "algorithm", "seed", "before", "after", f"steps to {GOAL:.0%}", "seconds to it", "seconds a step",
        title="held-out accuracy on the smoke task, one sample a prompt at T = 1",
    )  # fmt: skip
    for name in options.only:
        for seed in options.seeds:
            run = f"learning-{stamp}-{name}-{seed}"
            _grpo_ray(
                "train",
                "smoke",
                f"name={run}",
                f"seed={seed}",
                f"model.path={model}",
                "eval.every_steps=10",
                *ALGORITHMS[name],
            )
            table.add_row(name, str(seed), *_figures(Path("runs") / run))
            Console().print(table)


def _grpo_ray(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "launch", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"grpo-ray {' '.join(args)} failed:\n{done.stdout}{done.stderr}")


def _figures(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = {line["step"]: line["eval/accuracy"] for line in lines if "eval/accuracy" in line}
    seconds = {line["step"]: line["time/step"] for line in lines if "time/step" in line}
    first = min((step for step, value in accuracy.items() if value >= GOAL), default=None)
    to_goal = "" if first is None else f"{sum(s for step, s in seconds.items() if step <= first):.0f}"
    return [
        f"{accuracy[0]:.1%}",
        f"{accuracy[max(accuracy)]:.1%}",
        "not reached" if first is None else str(first),
        to_goal,
        f"{sum(seconds.values()) / len(seconds):.1f}",
    ]


if __name__ == "__main__":
    main()
