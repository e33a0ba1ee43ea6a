"""Whole runs in which a process of ours is killed or stopped: the same prompts are trained, each once, with the same rewards.

make chaos            each victim once, and random schedules by seeds 1 to CHAOS_SEEDS (5)
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.runs import LIMIT_S, NUM_STEPS, end_all, finish, launch, ledger, metrics, run, train, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]
SEEDS = range(1, int(os.environ.get("CHAOS_SEEDS", "5")) + 1)
# A learner that hangs is noticed at the deadline of its update; every other wait is shorter.
OVERRIDES = ("checkpoint.every_steps=2", "deadlines.update_s=20", "deadlines.sync_s=20", "deadlines.save_s=20")
BOUND_S = 60.0
"""From a death to the next step, on a machine with nothing else to do; tripled here."""


@dataclass(frozen=True)
class Victim:
    title: str
    """Part of its process' title."""
    signal: signal.Signals
    told: str
    """What the run says of it; empty where it need not say anything."""


VICTIMS = {
    "a learner": Victim("LearnerActor", signal.SIGKILL, "learner-0 died"),
    "a learner that hangs": Victim("LearnerActor", signal.SIGSTOP, "learner-0 did not finish"),
    "an engine": Victim("VLLM::EngineCore", signal.SIGKILL, "rollout-0"),
    "a rollout actor": Victim("RolloutActor", signal.SIGKILL, "rollout-0"),
    "a reward actor": Victim("RewardActor", signal.SIGKILL, ""),
    "a reward function's process": Victim("actors.reward_child", signal.SIGKILL, ""),
}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    end_all()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole_run(recipe: Path) -> Path:
    args, run_dir = train(recipe, "whole", *OVERRIDES)
    code, output = run(*args)
    assert code == 0, output
    return run_dir


def ours(root: subprocess.Popen[str], title: str) -> list[psutil.Process]:
    out = []
    for process in psutil.Process(root.pid).children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                out.append(process)
        except psutil.Error:
            continue
    return out


def steps_done(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def await_step(process: subprocess.Popen[str], run_dir: Path, step: int, limit_s: float = LIMIT_S) -> float:
    """Seconds until it was done."""
    started = time.monotonic()
    while steps_done(run_dir) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - started < limit_s, f"no step {step} within {limit_s} s"
        time.sleep(0.05)
    return time.monotonic() - started


def strike(process: subprocess.Popen[str], victim: Victim) -> int:
    """The pid of the one that was struck; one that is just being replaced is waited for."""
    for _ in range(600):
        if found := ours(process, victim.title):
            found[0].send_signal(victim.signal)
            return found[0].pid
        time.sleep(0.05)
    pytest.fail(f"no process is called {victim.title}")


def assert_same(run_dir: Path, whole_run: Path) -> None:
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert ledger(run_dir) == ledger(whole_run)
    for name in ("reward/mean", "grad_norm"):
        assert [m[name] for m in metrics(run_dir)] == pytest.approx([m[name] for m in metrics(whole_run)], rel=1e-4), (
            name
        )


@pytest.mark.parametrize("who", VICTIMS)
def test_a_death_costs_nothing_but_time(recipe: Path, whole_run: Path, who: str) -> None:
    victim = VICTIMS[who]
    args, run_dir = train(recipe, who.replace(" ", "-").replace("'", ""), *OVERRIDES)
    process = launch(*args)
    await_step(process, run_dir, 3)
    strike(process, victim)
    seconds = await_step(process, run_dir, 5, 3 * BOUND_S)
    print(f"{who}: two steps more after {seconds:.1f} s")
    code, output = finish(process)
    assert code == 0, output
    assert re.search(victim.told, output), output
    assert_same(run_dir, whole_run)


def test_a_dead_controller_is_resumed(recipe: Path, whole_run: Path) -> None:
    args, run_dir = train(recipe, "controller", *OVERRIDES)
    process = launch(*args)
    await_step(process, run_dir, 3)
    strike(process, Victim("Controller", signal.SIGKILL, ""))
    code, output = finish(process)
    assert code != 0, output
    assert "grpo-ray resume" in output
    code, output = run("resume", str(run_dir))
    assert code == 0, output
    assert_same(run_dir, whole_run)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("staleness", [0, 2])
def test_random_deaths_cost_nothing_but_time(recipe: Path, whole_run: Path, seed: int, staleness: int) -> None:
    """Two deaths of random processes at random moments of one run. Sampling ahead makes other batches, so there the ledger and
    the bound are looked at alone."""
    rng = random.Random(seed)
    options = (*OVERRIDES, f"algorithm.max_staleness={staleness}")
    args, run_dir = train(recipe, f"random-{seed}-{staleness}", *options)
    process = launch(*args)
    for after in sorted(rng.sample(range(1, NUM_STEPS - 1), 2)):
        await_step(process, run_dir, after)
        time.sleep(rng.uniform(0, 1))
        strike(process, VICTIMS[rng.choice(list(VICTIMS))])
    code, output = finish(process)
    assert code == 0, output
    if staleness == 0:
        assert_same(run_dir, whole_run)
    assert [row[2:4] for row in ledger(run_dir)] == [("trained", s) for s in range(1, NUM_STEPS + 1) for _ in range(4)]
    assert max(m["staleness/max"] for m in metrics(run_dir)) <= staleness
