"""`make bench-versus`: seconds of a training step here, with TRL, and by what the hardware allows. Tables of the README.

    python -m tests.bench.versus [--tasks even heavy] [--repeats 2] [--steps 8] [--only overlap trl-vllm] [--to-accuracy]

Repeats go round in the outer loop, each case in processes of its own, so that a machine that gets slower or faster hits all cases.
A row that is there already (`runs/bench-versus/rows.jsonl`) is not run again: a bench that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from actors.runtime import ALLOCATOR_ENV
from tests.bench.addition import TASKS
from tests.bench.versus_steps import read_steps, step_seconds, tokens_of
from tests.bench.watch import watch

FOLDER = Path("runs/bench-versus")
ROWS = FOLDER / "rows.jsonl"
SKIPPED = 3
"""First steps, which compile kernels and fill caches."""
SAMPLES = 256
GOALS, GOAL_STEPS = {"even": (0.7, 0.8, 0.9), "heavy": (0.6, 0.7, 0.8)}, 200
"""Of the race, which ends with the last of them: a step on `heavy` takes TRL up to half a minute. One evaluation decides, of 256
prompts: its standard error is 2 to 3 points."""
RACE = ("colocated", "trl-vllm", "trl-default")
"""To the goal, all by the same algorithm."""
RACE_RATE = 1e-4
"""Learning rate, of all. At twice of it accuracy goes to and fro between 60 and 90% for a hundred steps, and which evaluation is
the first above the goal is luck."""
WIDTH = 120
COLD_START_LIMIT_S = 3600.0
PEER_ENV = {
    **ALLOCATOR_ENV,
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What TRL is fastest with; the learner here sets the first of these for itself."""
BOUND_ENV = PEER_ENV | {"OMP_NUM_THREADS": "1"}
OUR_ENV = {"RAY_worker_niceness": "0"}
"""Ray's workers give way to everything else on the machine (nice 15); nobody else's do."""


@dataclass(frozen=True)
class Case:
    label: str
    kind: str
    """Whose step it is: ours, trl, bound."""
    arguments: tuple[str, ...]


CASES = {
    "on-policy": Case("grpo-ray, on-policy", "ours", ("learner.overlap=false",)),
    "on-policy-1": Case("grpo-ray, on-policy, a core each", "ours", ("learner.overlap=false", "learner.num_threads=1")),
    "overlap": Case("a core each, overlapped", "ours", ("learner.overlap=true", "learner.num_threads=1")),
    "overlap-waves": Case(
        "a core each, overlapped, in waves of 64 samples",
        "ours",
        ("learner.overlap=true", "learner.num_threads=1", "rollout.max_num_seqs=64"),
    ),
    "frozen": Case(
        "a core each, with a policy that stays as it was",
        "ours",
        ("learner.overlap=false", "learner.num_threads=1", "learner.learning_rate=1e-12"),
    ),
    "colocated": Case(
        "grpo-ray, on-policy, colocated: two engines, then two learners",
        "ours",
        (
            "cluster.placement=colocated",
            "rollout.num_actors=2",
            "rollout.num_cpus=0.5",
            "rollout.max_num_seqs=128",
            "learner.num_actors=2",
            "learner.num_cpus=0.5",
        ),
    ),
    "async": Case("grpo-ray, one update behind", "ours", ("algorithm.max_staleness=1", "learner.num_threads=1")),
    "async-2": Case(
        "grpo-ray, one update behind, two learners",
        "ours",
        ("algorithm.max_staleness=1", "learner.num_actors=2", "learner.num_cpus=0.5"),
    ),
    "trl-vllm": Case("TRL, vLLM colocated", "trl", ("vllm",)),
    "trl-default": Case("TRL, its default generation", "trl", ("transformers",)),
    "sampling": Case("bare vLLM, one core", "bound", ("sampling",)),
    "sampling-alike": Case("the same, in a process of its own, with seeds", "bound", ("sampling-alike",)),
    "packed": Case("bare passes, packed, one core", "bound", ("packed",)),
    "padded": Case("bare passes, padded, one core", "bound", ("padded",)),
}
BARE = ("sampling", "sampling-alike")
"""Of the policy of the first step; how fast others are sampled depends on how long their answers become, too: compare `frozen`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help=f"of a repeat; the first {SKIPPED} are not counted")
    parser.add_argument("--only", choices=CASES, nargs="+", help=f"default: all; to the accuracy: {' '.join(RACE)}")
    parser.add_argument("--micro-batch", type=int, default=64, help="TRL's, in samples")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for one case")
    parser.add_argument("--to-accuracy", action="store_true", help="seconds to held-out accuracies, instead")
    options = parser.parse_args()
    if options.steps < SKIPPED + 2:
        parser.error(f"--steps {options.steps}: the first {SKIPPED} are not counted; give {SKIPPED + 2} or more")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for task in options.tasks:
        _cold_start(task)
    if options.to_accuracy:
        for task in options.tasks:
            for name in options.only or RACE:
                _row("accuracy", task, name, 1, GOAL_STEPS, options)
            _print_accuracy(task)
        return
    for repeat in range(1, options.repeats + 1):
        for task in options.tasks:
            for name in options.only or CASES:
                _row("speed", task, name, repeat, options.steps, options)
    for task in options.tasks:
        _print_speed(task)
        _print_sampling(task)


def _cold_start(task: str) -> None:
    """A model per task, kept: `runs/bench-versus-TASK/hf`."""
    folder = Path(_model(task))
    if folder.exists():
        return
    shutil.rmtree(folder.parent, ignore_errors=True)
    t = TASKS[task]
    options = [
        f"name={folder.parent.name}",
        f"num_steps={t.cold_start_steps}",
        f"checkpoint.every_steps={t.cold_start_steps}",
        f"data.train.args.task={task}",
        f"model.tiny.context={t.context}",
        f"max_length={t.max_prompt_length + t.max_completion_length}",
    ]
    command = [sys.executable, "-m", "launch", "sft", "tests/bench/addition_sft.yaml", *options]
    subprocess.run(command, check=True, timeout=COLD_START_LIMIT_S, stdout=subprocess.DEVNULL, env=_env({}))


def _model(task: str) -> str:
    return f"runs/bench-versus-{task}/hf"


def _env(env: dict[str, str]) -> dict[str, str]:
    """This checkout first: the rewards are looked for by workers that start elsewhere."""
    return os.environ | env | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.getenv("PYTHONPATH")]))}


def _row(table: str, task: str, name: str, repeat: int, steps: int, options: argparse.Namespace) -> None:
    key: dict[str, Any] = {"table": table, "task": task, "name": name, "repeat": repeat, "steps": steps}
    key |= {"learning_rate": RACE_RATE} if table == "accuracy" else {}
    if any(key.items() <= row.items() for row in _rows()):
        return
    case, goals = CASES[name], GOALS[task]
    goal = goals[-1] if table == "accuracy" else None
    folder = Path("runs") / f"bench-versus-{table}-{task}-{name}-{repeat}"
    shutil.rmtree(folder, ignore_errors=True)
    ours = case.kind == "ours"
    path = folder / ("metrics.jsonl" if ours else "steps.jsonl")
    if ours:
        command = [*_train(task, folder.name, steps, goal), *case.arguments]
    else:
        module = "tests.bench.versus_trl" if case.kind == "trl" else "tests.bench.versus_bound"
        command = [sys.executable, "-m", module, *case.arguments, task, _model(task), str(steps), str(path)]
        if case.kind == "trl":
            command += ["--micro-batch", str(options.micro_batch)]
            command += [] if goal is None else ["--goal", str(goal), "--learning-rate", str(RACE_RATE)]
    watched = watch(
        command,
        steps=lambda: read_steps(path),
        log=FOLDER / "last.log",
        limit_s=options.limit if goal is None else COLD_START_LIMIT_S,
        env=_env(OUR_ENV if ours else PEER_ENV if case.kind == "trl" else BOUND_ENV),
        done=lambda lines: goal is not None and _first(lines, goal) is not None,
    )
    lines = read_steps(path)
    row = {**key, "peak_mib": watched.peak_bytes / 2**20, "command_s": watched.seconds}
    if goal is None:
        row |= _speed(lines, watched.cpu_s)
    else:
        row |= _accuracy(lines, goals)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def _train(task: str, name: str, steps: int, goal: float | None) -> list[str]:
    t = TASKS[task]
    options = [
        f"name={name}",
        f"num_steps={steps}",
        f"model.path={_model(task)}",
        f"data.train.args.task={task}",
        f"rollout.max_completion_length={t.max_completion_length}",
    ]
    if goal is not None:
        options += [
            f"learner.learning_rate={RACE_RATE}",
            f"data.eval={{path: 'python:tests.bench.addition.rows', args: {{task: {task}, part: held_out}}, limit: 256}}",
            "eval={every_steps: 5, temperature: 1.0, accuracy: tests.bench.addition.correct}",
        ]
    return [sys.executable, "-m", "launch", "train", "tests/bench/addition.yaml", *options]


def _speed(lines: Sequence[dict[str, Any]], cpu_s: dict[int, float]) -> dict[str, Any]:
    """Of the steps after the first ones. CPU seconds are between the first and the last of them that were seen in time."""
    lines = [line for line in lines if line["step"] >= SKIPPED]
    seconds, counted = step_seconds(lines), lines[1:]
    seen = sorted(step for step in cpu_s if step >= SKIPPED)
    row: dict[str, Any] = {
        "seconds": seconds,
        "tokens": [tokens_of(line, SAMPLES) for line in counted],
        "cpu_s": (cpu_s[seen[-1]] - cpu_s[seen[0]]) / (seen[-1] - seen[0]) if len(seen) > 1 else None,
    }
    if "rollout/0/busy_s" in lines[0]:
        row["busy_s"] = [line["rollout/0/busy_s"] for line in counted]
        row["engine_tokens"] = [line["rollout/0/tokens"] for line in counted]
        row["parts"] = {
            part: median(line.get(f"time/{part}", 0.0) for line in counted)
            for part in ("rollout", "reward", "update", "sync", "log", "other")
        }
    return row


def _first(lines: Sequence[dict[str, Any]], goal: float) -> int | None:
    """The first step whose evaluation reached the goal."""
    return next((line["step"] for line in lines if line.get("eval/accuracy", 0.0) >= goal), None)


def _accuracy(lines: Sequence[dict[str, Any]], goals: Sequence[float]) -> dict[str, Any]:
    """When each goal was reached first."""
    reached = [_first(lines, goal) for goal in goals]
    seconds = [_until(lines, step) for step in reached]
    last = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line][-1]
    return {"reached": reached, "seconds": seconds, "last_accuracy": last}


def _until(lines: Sequence[dict[str, Any]], step: int | None) -> float | None:
    """Seconds of all steps up to this one. The first is not timed: it counts as the mean of the others."""
    if step is None:
        return None
    seconds = step_seconds([line for line in lines if line["step"] <= step])
    return sum(seconds) * (1 + 1 / len(seconds))


def _rows(table: str = "", task: str = "") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    return [row for row in rows if (not table or row["table"] == table) and (not task or row["task"] == task)]


def _seconds(task: str, name: str) -> list[float]:
    """Of all counted steps of all repeats."""
    return [s for row in _rows("speed", task) if row["name"] == name for s in row["seconds"]]


def _fastest(task: str, names: Sequence[str]) -> float | None:
    return min((median(s) for name in names if (s := _seconds(task, name))), default=None)


def _bound(task: str) -> float | None:
    """The slower of sampling and passes, each as fast as it goes."""
    sampling, passes = _fastest(task, ["sampling"]), _fastest(task, ["packed", "padded"])
    return None if sampling is None or passes is None else max(sampling, passes)


def _print_speed(task: str) -> None:
    peer = _fastest(task, [name for name, case in CASES.items() if case.kind == "trl"])
    bound = _bound(task)
    columns = ("a step of", "s, median", "s, least", "samples/s", "tokens/s", "CPU s", "peak MiB", "x TRL", "x bound")
    out = Table(*columns, title=f"{task}: 32 prompts x 8 samples, 3 M parameters, fp32, {os.cpu_count()} cores")
    for name, case in CASES.items():
        rows = [row for row in _rows("speed", task) if row["name"] == name]
        if not rows:
            continue
        seconds = [s for row in rows for s in row["seconds"]]
        middle, tokens = median(seconds), sum(t for row in rows for t in row["tokens"])
        cpu = [row["cpu_s"] for row in rows if row["cpu_s"] is not None]
        out.add_row(
            case.label,
            f"{middle:.2f}",
            f"{min(seconds):.2f}",
            f"{SAMPLES / middle:.0f}",
            f"{tokens / sum(seconds):,.0f}",
            f"{median(cpu):.2f}" if cpu else "",
            f"{max(row['peak_mib'] for row in rows):,.0f}",
            f"{middle / peer:.2f}" if peer else "",
            f"{middle / bound:.2f}" if bound else "",
        )
    Console(width=WIDTH).print(out)


def _print_sampling(task: str) -> None:
    """Tokens by the time in which the engine has work, against bare engines."""
    rates = {}
    for name in CASES:
        rows = [row for row in _rows("speed", task) if row["name"] == name]
        bare = name in BARE
        if rows and (bare or "busy_s" in rows[0]):
            tokens, seconds = ("tokens", "seconds") if bare else ("engine_tokens", "busy_s")
            rates[name] = sum(t for row in rows for t in row[tokens]) / sum(s for row in rows for s in row[seconds])
    there = [name for name in BARE if name in rates]
    if not there:
        return
    columns = ("sampling through", "tokens/s", *(f"x {CASES[name].label}" for name in there))
    out = Table(*columns, title=f"{task}: completion tokens while the engine has work")
    for name, rate in rates.items():
        out.add_row(CASES[name].label, f"{rate:,.0f}", *(f"{rate / rates[other]:.2f}" for other in there))
    Console(width=WIDTH).print(out)


def _print_accuracy(task: str) -> None:
    columns = ("seconds (steps) to", *(f"{goal:.0%}" for goal in GOALS[task]), "last")
    out = Table(*columns, title=f"{task}: held-out accuracy, T = 1, 256 prompts")
    for row in _rows("accuracy", task):
        told = [
            "not reached" if step is None else f"{seconds:.0f} ({step})"
            for step, seconds in zip(row["reached"], row["seconds"], strict=True)
        ]
        out.add_row(CASES[row["name"]].label, *told, f"{row['last_accuracy']:.1%}")
    Console(width=WIDTH).print(out)


if __name__ == "__main__":
    main()
