"""An hour of training in which a process is killed every minute: what the run holds is flat, and its ledger is right.

    python -m tests.chaos.soak --minutes 60        (make soak)

A model of the smoke run's size, sampling one update ahead. Every `--every` seconds a process of the run gets SIGKILL, if a step was
done since the one before; which one, `--seed` decides. Memory, file descriptors, threads and the object store are looked at all the
while: medians over the first third against medians over the last one, after a start that is left out. Exits with 1 when one of
them has grown, when the ledger is wrong, when the run ends by itself, or when a process outlives it.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.bench.simulated import oldest_trained
from tests.chaos.processes import adopt_orphans, end, family, left_behind, title
from tests.chaos.victims import VICTIMS, find
from tests.end_to_end.runs import RECIPE, launch, metrics, train

STALENESS = 1
NUM_ROWS = 256
PROMPTS_PER_STEP = 8
KILLED = ("a learner", "an engine", "a rollout actor", "a reward actor", "a reward function's process")
MORTAL = {name.split(" ", 1)[1] for name in KILLED}
ROLES = {
    "controller": VICTIMS["the controller"].title,
    "rollout actor": VICTIMS["a rollout actor"].title,
    "engine": VICTIMS["an engine"].title,
    "learner": VICTIMS["a learner"].title,
    "reward actor": VICTIMS["a reward actor"].title,
    "reward function's process": VICTIMS["a reward function's process"].title,
    "raylet": "/raylet/raylet ",
    "gcs server": "/gcs/gcs_server ",
}
"""Role -> its command line, a regular expression."""
ROOT_ROLE = "command"
GROWN_UP_S = 45.0
"""A process is looked at from this age on: before, it loads."""
YOUNG_S = 120.0
"""And one that may be killed up to this age: engines grow for some hundred steps, while they meet batches of sizes new to them, and
those of one third may have lived longer than those of another."""
LOOK_S = 15.0
START_S = 600.0
STUCK_S = 420.0
"""Without a step for so long, the run hangs."""
END_S = 240.0
MIB = float(2**20)
ALLOWED = {
    "MiB": (1.10, 16.0),
    "files": (1.05, 4.0),
    "threads": (1.05, 4.0),
    "store MiB": (1.10, 16.0),
    "number": (1.0, 2.0),
}
"""Measure -> what the last third may be over the first one: this factor, and so much more."""


@dataclass
class Seen:
    """(role, measure) -> (seconds since the start, value)."""

    values: dict[tuple[str, str], list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, at: float, role: str, measure: str, value: float) -> None:
        self.values[role, measure].append((at, value))

    def thirds(self, begin: float, end: float) -> Iterator[tuple[str, str, float, float]]:
        """role, measure, median of the first third, median of the last."""
        third = (end - begin) / 3
        for (role, measure), points in self.values.items():
            first = [v for t, v in points if begin <= t <= begin + third]
            last = [v for t, v in points if end - third <= t <= end]
            if first and last:
                yield role, measure, statistics.median(first), statistics.median(last)


def look(root: int, seen: Seen, at: float) -> None:
    everyone = [psutil.Process(root), *family(root)]
    of_role: dict[tuple[str, str], list[float]] = defaultdict(list)
    raylet_log = None
    for process in everyone:
        words = title(process)
        role = (
            ROOT_ROLE if process.pid == root else next((r for r, how in ROLES.items() if re.search(how, words)), None)
        )
        if role == "raylet" and (found := re.search(r"--log_dir=(\S+)", words)):
            raylet_log = Path(found[1]) / "debug_state.txt"
        try:
            age = time.time() - process.create_time()
            if role is None or age < GROWN_UP_S or (role in MORTAL and age > YOUNG_S):
                continue
            of_role[role, "MiB"].append(process.memory_full_info().uss / MIB)
            of_role[role, "files"].append(process.num_fds())
            of_role[role, "threads"].append(process.num_threads())
        except psutil.Error:
            continue
    for (role, measure), values in of_role.items():
        seen.add(at, role, measure, statistics.mean(values))
    seen.add(at, "all processes", "number", len(everyone))
    zombies = sum(_is_zombie(p) for p in everyone)
    seen.add(at, "zombies", "number", zombies)
    if raylet_log is not None and (pinned := re.search(r"pinned objects size: (\d+)", raylet_log.read_text())):
        seen.add(at, "object store", "store MiB", int(pinned[1]) / MIB)


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def recipe() -> dict[str, Any]:
    out: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in RECIPE.items()}
    out["model"] = {
        "dtype": "float32",
        "tiny": {"hidden_size": 320, "num_layers": 2, "num_heads": 10, "num_kv_heads": 2, "context": 256, "seed": 1},
    }
    out["data"] = {
        "train": {"path": "reasoning_gym:chain_sum", "args": {"size": NUM_ROWS, "seed": 1}},
        "max_prompt_length": 120,
    }
    # An engine touches its cache little by little: a small one is whole within a minute.
    out["rollout"] |= {"num_generations": 8, "max_completion_length": 64, "kv_cache_gb": 0.03}
    out["reward"] |= {"num_actors": 2}
    out["learner"] |= {"learning_rate": 1e-5, "num_threads": 1, "max_restarts": 5}
    out["checkpoint"] = {"every_steps": 5, "keep": 2, "export": False}
    out["deadlines"] = {"update_s": 120, "sync_s": 120, "save_s": 120, "start_s": 300}
    del out["eval"]
    return out | {
        "prompts_per_step": PROMPTS_PER_STEP,
        "num_steps": 1_000_000,
        "algorithm": {"max_staleness": STALENESS},
    }


def ledger_faults(run: Path) -> list[str]:
    """What is wrong with a run's ledger: every prompt once per epoch, in order, and none too old."""
    with sqlite3.connect(run / "ledger.sqlite") as db:
        rows = db.execute(
            "SELECT prompt_id, dispatch_order, state, step FROM groups ORDER BY dispatch_order"
        ).fetchall()
    steps = [line["step"] for line in metrics(run)]
    trained = [row for row in rows if row[2] == "trained"]
    faults = []
    if len({row[0] for row in rows}) != len(rows) or [row[1] for row in rows] != list(range(len(rows))):
        faults.append("a prompt is there twice, or missing")
    if [row[3] for row in trained] != [i // PROMPTS_PER_STEP + 1 for i in range(len(trained))]:
        faults.append("prompts are not trained in order")
    if dropped := [row for row in rows if row[2] == "dropped"]:
        faults.append(f"{len(dropped)} groups were dropped, the first {dropped[0]}")
    if steps != list(range(1, len(steps) + 1)) or len(trained) != PROMPTS_PER_STEP * len(steps):
        faults.append(f"{len(steps)} steps are told of, and {len(trained)} groups are trained")
    epochs = Counter(row[0].split("/")[-2] for row in trained)
    if partial := [e for e, count in epochs.items() if count != NUM_ROWS][:-1]:
        faults.append(f"epochs {partial} are over and not whole: {dict(epochs)}")
    if (age := oldest_trained(run / "ledger.sqlite")) > STALENESS:
        faults.append(f"a group was trained {age} updates after its oldest token")
    return faults


class StepFile:
    """A run's metrics, read again only when they have changed."""

    def __init__(self, run: Path) -> None:
        self._path = run / "metrics.jsonl"
        self._size, self._count = -1, 0

    def count(self) -> int:
        """Steps done, but for those that a resumed run will do again."""
        size = self._path.stat().st_size if self._path.exists() else -1
        if size != self._size:
            self._size, self._count = size, self._path.read_bytes().count(b'"loss/policy"')
        return self._count


def table(rows: Sequence[tuple[str, str, float, float]]) -> tuple[str, list[str]]:
    """As Markdown; and what has grown."""
    lines, grown = ["| who | what | first third | last third |", "|---|---|---|---|"], []
    for role, measure, first, last in rows:
        factor, more = ALLOWED[measure]
        mark = ""
        if last > first * factor + more:
            grown.append(f"{role}: {measure} {first:.1f} -> {last:.1f}")
            mark = " **grown**"
        lines.append(f"| {role} | {measure} | {first:.1f} | {last:.1f}{mark} |")
    return "\n".join(lines), grown


def soak(folder: Path, minutes: float, every_s: float, seed: int) -> int:
    rng = random.Random(seed)
    (folder / "soak.yaml").write_text(yaml.safe_dump(recipe()))
    args, run = train(folder / "soak.yaml", "soak")
    output = folder / "output.txt"
    with open(output, "w") as out:
        process = launch(*args, output=out)
    try:
        return _watch(process, run, output, minutes, every_s, rng)
    finally:
        if process.poll() is None:
            process.kill()
        end(family())


def _watch(
    process: subprocess.Popen[str], run: Path, output: Path, minutes: float, every_s: float, rng: random.Random
) -> int:
    launched = time.monotonic()
    step_file = StepFile(run)
    while step_file.count() < 3:
        if process.poll() is not None or time.monotonic() - launched > START_S:
            print(f"no third step:\n{output.read_text()}")
            return 1
        time.sleep(1)
    seen, kills = Seen(), Counter[str]()
    began = last_step_at = time.monotonic()
    killed_at, done, done_at_kill, victim = began, step_file.count(), 0, ""
    first_step = done
    waits: dict[str, list[float]] = defaultdict(list)
    next_look = began
    faults: list[str] = []
    while (now := time.monotonic()) - began < 60 * minutes:
        if process.poll() is not None:
            faults.append(f"the run ended by itself:\n{output.read_text()[-3000:]}")
            break
        if (steps := step_file.count()) > done:
            done, last_step_at = steps, now
            if victim and done >= done_at_kill + 2:
                waits[victim].append(now - killed_at)
                victim = ""
        if now - last_step_at > STUCK_S:
            faults.append(f"no step for {STUCK_S:g} s:\n{output.read_text()[-3000:]}")
            break
        if now - killed_at >= every_s and not victim:
            kind = rng.choice(KILLED)
            if targets := find(process.pid, VICTIMS[kind]):
                rng.choice(targets).kill()
                killed_at, done_at_kill, victim = now, done, kind
                kills[kind] += 1
                print(f"{(now - began) / 60:5.1f} min  step {done}  {kind} is killed", flush=True)
        if now >= next_look:
            look(process.pid, seen, now - began)
            next_look = now + LOOK_S
        time.sleep(0.2)
    lasted = time.monotonic() - began
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            code = process.wait(END_S)
            if code != 130:
                faults.append(f"exit code {code} after SIGINT:\n{output.read_text()[-3000:]}")
        except subprocess.TimeoutExpired:
            faults.append(f"no end within {END_S:g} s of SIGINT")
    faults += [f"left behind: {who}" for who in left_behind(20)]
    faults += ledger_faults(run)
    told, grown = table(list(seen.thirds(min(300.0, lasted / 6), lasted)))
    print(f"\n{lasted / 60:.0f} minutes, {done - first_step} steps, {sum(kills.values())} kills: {dict(kills)}")
    for kind, seconds in waits.items():
        print(
            f"  {kind}: two steps more after {statistics.median(seconds):.0f} s (median), {max(seconds):.0f} s (maximum)"
        )
    print(told)
    for fault in (*faults, *(f"grown: {g}" for g in grown)):
        print(fault)
    print("failed" if faults or grown else "passed")
    return 1 if faults or grown else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="leave the run's folder where it is")
    args = parser.parse_args()
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"{folder}", flush=True)
    try:
        return soak(folder, args.minutes, args.every, args.seed)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
