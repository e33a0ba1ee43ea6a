"""How long a run needs after a death: until two more steps are done, and until a step takes no longer than before.

    python -m tests.chaos.recovery --repeats 5

Engine, rollout actor, reward actor and learner die in one run of the soak's recipe, on-policy, one after the other; the controller
in another, which is resumed at once; a node with one of two engines in a third, on a cluster with a spare node for its engine.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import yaml

from tests.chaos.processes import adopt_orphans, end, family
from tests.chaos.soak import StepFile, recipe
from tests.chaos.victims import VICTIMS, strike
from tests.end_to_end.clusters import Place
from tests.end_to_end.runs import launch, metrics, train

IN_ONE_RUN = ("an engine", "a rollout actor", "a reward actor", "a learner")
STEADY = 3
"""Steps before a death, all of whose workers are there."""
FULL = 1.25
"""Of the median step before, what a step may take to count as full throughput."""
LIMIT_S = 600.0
OPTIONS = ("algorithm.max_staleness=0", "checkpoint.every_steps=2", "deadlines.sync_s=60")


@dataclass
class Recovered:
    two_steps_s: list[float] = field(default_factory=list)
    full_s: list[float] = field(default_factory=list)

    def row(self, who: str) -> str:
        cells = (f"{statistics.median(s):.0f} / {max(s):.0f} s" for s in (self.two_steps_s, self.full_s))
        return f"| {who} | {' | '.join(cells)} | {len(self.full_s)} |"


class Clock:
    """When each step of a run was done, by its file; a run that went back to a checkpoint does steps again."""

    def __init__(self, run: Path) -> None:
        self._steps = StepFile(run)
        self._count = self._steps.count()
        self.done: list[float] = []

    def await_steps(self, number: int) -> None:
        """So many more than now."""
        wanted, deadline = len(self.done) + number, time.monotonic() + LIMIT_S
        while len(self.done) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{number} steps take longer than {LIMIT_S:g} s")
            count = self._steps.count()
            self.done += [time.monotonic()] * max(0, count - self._count)
            self._count = count
            time.sleep(0.02)

    def last_s(self, number: int) -> float:
        """Median time of the last steps."""
        times = self.done[-number - 1 :]
        return statistics.median(b - a for a, b in pairwise(times))


def measure(clock: Clock, kill: Callable[[], None], into: Recovered, whole: Callable[[], bool] = lambda: True) -> None:
    """`whole`: all workers take part again."""
    clock.await_steps(STEADY + 1)
    before_s = clock.last_s(STEADY)
    killed = time.monotonic()
    kill()
    clock.await_steps(2)
    into.two_steps_s.append(clock.done[-1] - killed)
    while clock.last_s(1) > FULL * before_s or not whole():
        clock.await_steps(1)
    into.full_s.append(clock.done[-1] - killed)
    print(f"  {into.two_steps_s[-1]:.1f} s, {into.full_s[-1]:.1f} s", flush=True)


@contextmanager
def running(folder: Path, name: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    path = folder / "recovery.yaml"
    path.write_text(yaml.safe_dump(recipe()))
    args, run = train(path, name, *OPTIONS)
    with open(folder / f"{name}.txt", "w") as output:
        process = launch(*args, output=output)
        try:
            yield process, run
        finally:
            end(family())


def of_workers(folder: Path, repeats: int, out: dict[str, Recovered]) -> None:
    with running(folder, "workers") as (process, run):
        clock = Clock(run)
        clock.await_steps(2)
        for _ in range(repeats):
            for who in IN_ONE_RUN:
                print(who, flush=True)
                measure(clock, partial(_strike, process.pid, who), out[who])


def _strike(pid: int, who: str) -> None:
    assert strike(pid, VICTIMS[who]) is not None, who


def of_controllers(folder: Path, repeats: int, out: dict[str, Recovered]) -> None:
    """The one of the command, and those of each resume after it."""
    who = "the controller, resumed at once"
    with running(folder, "controller") as (process, run), open(folder / "resumed.txt", "w") as output:
        clock = Clock(run)
        clock.await_steps(2)

        def kill() -> None:
            nonlocal process
            _strike(process.pid, "the controller")
            process.wait(LIMIT_S)
            process = launch("resume", str(run), output=output)

        for _ in range(repeats):
            print(who, flush=True)
            measure(clock, kill, out[who])


def of_nodes(folder: Path, repeats: int, out: dict[str, Recovered]) -> None:
    """Two engines, three nodes that can have one."""
    who = "a node with one of two engines"
    place = Place(folder)
    try:
        place.make_token()
        place.start_head('--resources={"engines": 1}')
        for number in range(2):
            place.add_node(f"n{number}", 1, engines=1)
        given = yaml.safe_load((place.folder / "tiny.yaml").read_text())
        (place.folder / "nodes.yaml").write_text(yaml.safe_dump({**recipe(), "reward": given["reward"]}))
        options = (*OPTIONS, "rollout.num_actors=2", "rollout.resources={engines: 1}", "learner.num_cpus=0")
        code, output = place.run(
            "submit", "nodes.yaml", "name=nodes", *options, "--no-wait", "--address", place.address
        )
        assert code == 0, output
        run = place.runs / "nodes"
        clock = Clock(run)

        def both() -> bool:
            return metrics(run)[-1]["sync/engines"] == 2

        clock.await_steps(2)
        for number in range(2, repeats + 2):
            print(who, flush=True)
            while not both() or len(place.nodes()) != 3:
                clock.await_steps(1)
            sites = [s for n, s in place.where("nodes").items() if "rollout" in n and s]
            measure(clock, partial(place.kill_node, sites[0]), out[who], both)
            place.add_node(f"n{number}", 1, engines=1)
    finally:
        place.close()
        end(family())


PARTS = {"workers": of_workers, "controllers": of_controllers, "nodes": of_nodes}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=list(PARTS))
    args = parser.parse_args(arguments)
    adopt_orphans()
    out: dict[str, Recovered] = defaultdict(Recovered)
    for part in args.only:
        folder = Path(tempfile.mkdtemp(prefix="recovery-"))
        try:
            PARTS[part](folder, args.repeats, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        "| who dies | two more steps, median / maximum | full throughput, median / maximum | deaths |\n|---|---|---|---|"
    )
    print("\n".join(recovered.row(who) for who, recovered in out.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
