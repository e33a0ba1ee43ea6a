"""`make bench-simulate`: the controller's own code with 1,024 samplers and 256 learners that are simulated, in virtual time.

Each row is a process of its own. What it can say: whether the schedule leaves anybody idle, whether the bound on staleness holds,
and what the controller's code costs. What it can't: anything about real engines, or Ray's own share of each call.

python -m tests.bench.simulate [ROW ...]
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from actors.runtime import settle_garbage_collector
from tests.bench.simulated import Plan, Result, Simulation, World, oldest_trained, rss_mib

TIMEOUT_S = 3600

ENOUGH = Plan(prompts=512, learner_tokens_per_s=250)
"""Samplers suffice: an update takes half as long again as the longest sample."""
SCARCE = ENOUGH.with_(learner_tokens_per_s=4000, max_num_seqs=8)
"""Samplers are what there is too little of."""
LONG = Plan(
    samplers=2, learners=1, scorers=1, prompts=1, group=2, staleness=1, steps=10_000, rows=7000,
    median_tokens=200, max_tokens=2048, learner_tokens_per_s=100,
)  # fmt: skip

SCHEDULES = {
    "enough-0": ENOUGH.with_(staleness=0, steps=4),
    "enough-1": ENOUGH.with_(staleness=1, steps=8),
    "enough-2": ENOUGH.with_(staleness=2, steps=11),
    "enough-4": ENOUGH.with_(staleness=4, steps=17),
    "enough-1-deaths": ENOUGH.with_(staleness=1, steps=8, deaths=tuple(range(600, 4000, 100))),
    "scarce-1": SCARCE.with_(staleness=1, steps=8),
    "scarce-4": SCARCE.with_(staleness=4, steps=17),
    "scarce-8": SCARCE.with_(staleness=8, steps=29),
}
MEMORY = {"rss": LONG, "tracemalloc": LONG.with_(steps=2000)}


def schedule(plan: Plan) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settle_garbage_collector(plan.config().samples_under_way)
        simulation = Simulation(plan, Path(folder))
        result = simulation.run()
        return {"staleness": oldest_trained(simulation.run_dir.ledger), **_figures(result)}


def _figures(r: Result) -> dict[str, Any]:
    return {
        "step_s": r.step_s,
        "of_ideal": r.of_ideal,
        "of_bound": r.bound_s / r.step_s,
        "learners_idle": r.learners_idle,
        "sync": r.steady.transfer_s / r.steady.now_s,
        "samplers_idle": r.samplers_idle,
        "places_taken": r.places_taken,
        "controller_ms": r.controller_ms,
        "controller_best_ms": r.controller_best_ms,
        "controller_share": r.steady.controller_cpu_s / r.steady.now_s,
        "calls": r.steady.calls / r.steady.groups,
        "turns": r.steady.turns / r.steady.groups,
        "late_s": r.late_s,
        "num_deaths": r.num_deaths,
    }


def memory(plan: Plan, *, traced: bool) -> list[dict[str, float]]:
    """What the process holds at eleven points of the run."""
    points: list[dict[str, float]] = []
    marks = {plan.steps * k // 100 for k in (2, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)}

    def look(step: int, world: World) -> None:
        if step in marks:
            gc.collect()
            point = {"step": float(step), "rss_mib": rss_mib(), "blocks": float(sys.getallocatedblocks())}
            if traced:
                point["traced_mib"] = tracemalloc.get_traced_memory()[0] / 2**20
            points.append(point)

    with tempfile.TemporaryDirectory() as folder:
        if traced:
            tracemalloc.start()
        Simulation(plan, Path(folder), on_step=look).run()
    return points


def _unit_us() -> float:
    """One round of an empty loop, a hundred times: how fast this machine is just now."""
    times = []
    for _ in range(5):
        started = time.process_time()
        for _ in range(1_000_000):
            pass
        times.append(time.process_time() - started)
    return min(times) * 100


def _run(name: str) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.simulate", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _one(name: str) -> Any:
    import torch

    torch.set_num_threads(1)
    return schedule(SCHEDULES[name]) if name in SCHEDULES else memory(MEMORY[name], traced=name == "tracemalloc")


def _schedules(names: Sequence[str]) -> None:
    table = Table(
        "", "k", "step s", "of ideal", "of bound", "learners idle", "sending weights", "samplers idle", "places taken",
        "oldest in ledger", "controller ms/group", "best step", "of a core", "calls/group", "turns/group", "dead engines",
        title=f"{ENOUGH.samplers} samplers, {ENOUGH.learners} learners, {ENOUGH.prompts} x {ENOUGH.group} samples a step of "
        f"{ENOUGH.min_tokens} to {ENOUGH.max_tokens} tokens (log-normal, median {ENOUGH.median_tokens:.0f}); virtual time",
        caption="ideal: the slower of full samplers and of the updates; bound: the longest sample counted too. CPU time with "
        f"asyncio's, without Ray's; an empty loop's round takes {_unit_us() * 10:.0f} ns here",
    )  # fmt: skip
    for name in names:
        r = _run(name)
        table.add_row(
            name,
            str(SCHEDULES[name].staleness),
            f"{r['step_s']:.0f}",
            *(
                f"{r[key]:.1%}"
                for key in ("of_ideal", "of_bound", "learners_idle", "sync", "samplers_idle", "places_taken")
            ),
            str(r["staleness"]),
            f"{r['controller_ms']:.2f}",
            f"{r['controller_best_ms']:.2f}",
            f"{r['controller_share']:.2%}",
            f"{r['calls']:.0f}",
            f"{r['turns']:.0f}",
            str(r["num_deaths"]),
        )
        Console(width=180).print(table)


def _memory(name: str) -> None:
    plan = MEMORY[name]
    table = Table(
        "step", "RSS MiB", "Python's blocks", "tracemalloc MiB",
        title=f"memory over {plan.steps} steps of {plan.prompts} x {plan.group} samples ({name})",
    )  # fmt: skip
    points = _run(name)
    for point in points:
        traced = f"{point['traced_mib']:.2f}" if "traced_mib" in point else ""
        table.add_row(f"{point['step']:.0f}", f"{point['rss_mib']:.1f}", f"{point['blocks']:.0f}", traced)
    # The first tenth fills what is bounded: the last steps for the advice, the caches of allocators.
    steps = np.array([p["step"] for p in points[1:]])
    for what, unit in (("rss_mib", "MiB of RSS"), ("blocks", "blocks")):
        slope = np.polyfit(steps, [p[what] for p in points[1:]], 1)[0]
        table.caption = (
            f"{table.caption or 'after the first tenth, fitted:'} {slope * 1000:+.2f} {unit} in 1,000 steps;"
        )
    Console().print(table)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(_one(sys.argv[2])))
        return
    names = sys.argv[1:] or [*SCHEDULES, *MEMORY]
    if chosen := [n for n in names if n in SCHEDULES]:
        _schedules(chosen)
    for name in (n for n in names if n in MEMORY):
        _memory(name)


if __name__ == "__main__":
    main()
