"""Whole runs in which processes of ours are killed or stopped: the same prompts are trained, each once, with the same rewards, and
no process outlives its run.

make chaos            each victim once, and random schedules by seeds 1 to CHAOS_SEEDS (10), on-policy and two updates ahead
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.simulated import oldest_trained
from tests.chaos.processes import adopt_orphans, end, left_behind, living
from tests.chaos.victims import NUM_STEPS, OVERRIDES, VICTIMS, Victim, strike
from tests.end_to_end.runs import LIMIT_S, finish, launch, ledger, metrics, run, train, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(6 * LIMIT_S)]
SEEDS = range(1, int(os.environ.get("CHAOS_SEEDS", "10")) + 1)
DEATHS = 2
"""Of a random schedule."""
BOUND_S = 60.0
"""From the moment a death is noticed to the next step, on a machine with nothing else to do; tripled here."""
END_S = 15.0
"""After a run: until all of its processes are gone."""


@pytest.fixture(autouse=True, scope="module")
def orphans_stay_here() -> None:
    adopt_orphans()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = {p.pid for p in living()}
    yield
    found = left_behind(END_S, before)
    end(living(before))
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole_run(recipe: Path) -> Path:
    args, run_dir = train(recipe, "whole", *OVERRIDES)
    code, output = run(*args)
    assert code == 0, output
    return run_dir


def named(who: str) -> str:
    return who.replace(" ", "-").replace("'", "")


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


def resume(process: subprocess.Popen[str], victim: Victim, run_dir: Path) -> subprocess.Popen[str]:
    """After a death that ends the run: it says so, leaves nothing behind, and goes on when asked to."""
    code, output = finish(process)
    assert code != 0, output
    assert re.search(victim.told, " ".join(output.split())), output
    found = left_behind(END_S)
    assert not found, "\n".join(found)
    return launch("resume", str(run_dir))


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
    args, run_dir = train(recipe, named(who), *OVERRIDES)
    process = launch(*args)
    await_step(process, run_dir, 3)
    struck = time.monotonic()
    assert strike(process.pid, victim) is not None
    if victim.ends_run:
        process = resume(process, victim, run_dir)
    await_step(process, run_dir, 5, victim.noticed_s + 3 * BOUND_S)
    print(f"{who}: two steps more after {time.monotonic() - struck:.1f} s")
    code, output = finish(process)
    assert code == 0, output
    assert victim.ends_run or re.search(victim.told, output), output
    assert_same(run_dir, whole_run)


def test_a_learner_that_dies_before_the_first_checkpoint_goes_on_from_the_beginning_and_nothing_recorded_is_lost(
    recipe: Path, whole_run: Path
) -> None:
    args, run_dir = train(recipe, "before", *OVERRIDES, "checkpoint.every_steps=1000")
    process = launch(*args)
    await_step(process, run_dir, 3)
    lines = metrics(run_dir)
    assert strike(process.pid, VICTIMS["a learner"]) is not None
    code, output = finish(process)
    assert code == 0, output
    assert "learners start again from the checkpoint of step 0" in output.replace("\n", " ")
    assert_same(run_dir, whole_run)
    kept = run_dir / "superseded" / "1"
    assert metrics(kept)[: len(lines)] == lines
    steps = [m["step"] for m in metrics(kept)]
    assert steps == list(range(1, len(steps) + 1))
    for folder, number in ((kept, len(steps)), (run_dir, NUM_STEPS)):
        files = sorted(p.name for p in (folder / "rollouts").iterdir())
        assert files == [f"step-{i:06d}.parquet" for i in range(1, number + 1)]
    assert f"steps 1 to {len(steps)} will be done again" in output.replace("\n", " ")
    trained = [json.loads(line)["step"] for line in (kept / "ledger.jsonl").read_text().splitlines()]
    assert trained == [step for step in steps for _ in range(4)]


def test_a_run_whose_checkpoints_are_gone_is_not_resumed(whole_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "gone"
    shutil.copytree(whole_run, run_dir, symlinks=True)
    shutil.rmtree(run_dir / "checkpoints")
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and not p.name.endswith("-shm")}
    code, output = run("resume", str(run_dir))
    assert code == 1, output
    assert f"has recorded {NUM_STEPS} steps, and there is no checkpoint in {run_dir}/checkpoints" in output.replace(
        "\n", " "
    )
    assert {p: p.read_bytes() for p in before} == before


def test_a_learner_that_dies_while_the_engine_restarts_is_replaced(recipe: Path, whole_run: Path) -> None:
    """The new engine waits for weights, and the samples for the engine: nobody else asks the learner for anything."""
    args, run_dir = train(recipe, "both", *OVERRIDES)
    process = launch(*args)
    await_step(process, run_dir, 3)
    for who in ("an engine", "a learner"):
        assert strike(process.pid, VICTIMS[who]) is not None
    await_step(process, run_dir, steps_done(run_dir) + 2, 3 * BOUND_S)
    code, output = finish(process)
    assert code == 0, output
    assert_same(run_dir, whole_run)


def test_a_learner_that_dies_again_while_it_starts_is_started_once_more(recipe: Path, whole_run: Path) -> None:
    args, run_dir = train(recipe, "again", *OVERRIDES)
    process = launch(*args)
    await_step(process, run_dir, 3)
    killed: set[int | None] = set()
    while len(killed) < 3:
        killed.add(strike(process.pid, VICTIMS["a learner"]))
    assert None not in killed
    await_step(process, run_dir, steps_done(run_dir) + 2, 3 * BOUND_S)
    code, output = finish(process)
    assert code == 0, output
    assert output.count("Learners start again in") == 2, output
    assert_same(run_dir, whole_run)


@pytest.mark.parametrize("who", [who for who in VICTIMS if who.endswith("hangs") and not VICTIMS[who].ends_run])
def test_who_hangs_again_while_it_starts_is_started_once_more(recipe: Path, whole_run: Path, who: str) -> None:
    args, run_dir = train(recipe, f"{named(who)}-again", *OVERRIDES)
    process = launch(*args)
    await_step(process, run_dir, 3)
    for _ in range(2):
        assert strike(process.pid, VICTIMS[who]) is not None
    await_step(process, run_dir, steps_done(run_dir) + 2, 3 * BOUND_S)
    code, output = finish(process)
    assert code == 0, output
    assert_same(run_dir, whole_run)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_deaths_cost_nothing_but_time(recipe: Path, whole_run: Path, seed: int, staleness: int) -> None:
    """Random processes die or hang at random moments of one run. Sampling ahead makes other batches, so there the ledger and the
    bound are looked at alone."""
    rng = random.Random(100 * staleness + seed)
    args, run_dir = train(recipe, f"random-{seed}-{staleness}", *OVERRIDES, f"algorithm.max_staleness={staleness}")
    process = launch(*args)
    limit_s: float = LIMIT_S
    floor = 0
    for after in sorted(rng.sample(range(1, NUM_STEPS - 2), DEATHS)):
        # A run that starts ends when one of its workers dies, with a message: it has nothing to lose yet.
        await_step(process, run_dir, max(after, floor), limit_s)
        time.sleep(rng.uniform(0, 1))
        who = rng.choice(list(VICTIMS))
        struck = strike(process.pid, VICTIMS[who])
        print(f"after step {steps_done(run_dir)}: {who}, {struck}")
        if struck is not None and VICTIMS[who].ends_run:
            process = resume(process, VICTIMS[who], run_dir)
        floor = min(steps_done(run_dir) + 1, NUM_STEPS)
        limit_s = VICTIMS[who].noticed_s + 3 * BOUND_S
    code, output = finish(process)
    assert code == 0, output
    if staleness == 0:
        assert_same(run_dir, whole_run)
    assert [row[2:4] for row in ledger(run_dir)] == [("trained", s) for s in range(1, NUM_STEPS + 1) for _ in range(4)]
    assert len({row[0] for row in ledger(run_dir)}) == 4 * NUM_STEPS
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, NUM_STEPS + 1))
    assert max(m["staleness/max"] for m in metrics(run_dir)) <= staleness
    assert oldest_trained(run_dir / "ledger.sqlite") <= staleness
