"""`make mutants`: small mistakes put into the code one at a time by mutmut, and whether a fast test notices each.

Which modules and which tests: `[tool.mutmut]` in pyproject.toml. Mistakes that change nothing are listed with their reasons in
equivalent.yaml. The exit code is 1 below 95% in any part, with every mistake that nobody noticed printed as a diff. mutmut keeps
what it found under mutants/: mistakes in functions that changed, and those that nobody noticed, are tried again; without that
folder all are. A sample of each part is drawn by a seed: 400 mistakes, a third of an hour on two quiet cores; `SAMPLE=100` draws
so many, `SAMPLE=all` takes all 11,000 (an hour and a half), `MUTANTS='grpo_ray.algorithm.losses.*'` some by name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from mutmut.__main__ import create_mutants
from mutmut.utils.file_utils import copy_src_dir
from rich.console import Console
from rich.table import Table

from tests.mutants.survivors import Equivalents, Mutant, forget_gone, forget_unnoticed, read_mutants

GOAL = 0.95
PARTS = {
    "algorithms": (
        "algorithm.advantages",
        "algorithm.losses",
        "batch.segments",
        "batch.truncation",
        "algorithm.mismatch",
    ),
    "batches": ("algorithm.train_batch", "batch.plan", "batch.pack", "batch.sequence"),
    "run files": (
        *("run.run_dir", "run.saver", "run.manifest", "run.checkpoint_store", "files", "run.delivery", "run.ended"),
        *("run.fragments", "run.ledger", "run.rollout_log", "run.sample_columns", "run.records"),
    ),
    "data": ("data.sources", "data.prompts", "data.cursor", "data.epochs", "data.turns", "data.thinking", "loop.stops"),
    "rewards": ("rewards",),
}
EQUIVALENTS = Path(__file__).with_name("equivalent.yaml")
FAILED = Path("mutants/mutmut-failed.txt")
"""Written by quickest_first.py."""


def part_of(mutant: Mutant) -> str:
    """The part that a mutant's module belongs to."""
    module = f"{mutant.module.removeprefix('grpo_ray.')}."
    return next((part for part, names in PARTS.items() if module.startswith(tuple(f"{n}." for n in names))), "others")


def try_mutants(patterns: Sequence[str]) -> None:
    """mutmut's run, with no more of pytest than it needs: it starts once for each mistake. Processes that tests start find the
    mutated copy first, too."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path("mutants").resolve()), os.environ.get("PYTHONPATH")))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "pytest_timeout,tests.mutants.quickest_first",
    }
    subprocess.run([sys.executable, "-m", "mutmut", "run", *patterns], check=False, env=env)


def generate() -> None:
    """The copy of the code with every mistake in it, under mutants/."""
    Path("mutants").mkdir(exist_ok=True)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        copy_src_dir()
        create_mutants(os.cpu_count() or 1)
    forget_gone()


def sample_size(word: str) -> int | None:
    return None if word == "all" else int(word)


def drawn(size: int, seed: int) -> list[str]:
    """Names of so many mutants of each part."""
    generate()
    by_part: dict[str, list[str]] = defaultdict(list)
    for mutant in read_mutants():
        by_part[part_of(mutant)].append(mutant.name)
    of_seed = random.Random(seed)
    return [name for names in by_part.values() for name in of_seed.sample(sorted(names), min(size, len(names)))]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("patterns", nargs="*", help="names of mutants, as mutmut gives them; none: all")
    parser.add_argument("--sample", type=sample_size, help="so many of each part, drawn by the seed, or `all`")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(words)
    patterns = drawn(options.sample, options.seed) if options.sample else options.patterns
    forget_unnoticed()
    FAILED.unlink(missing_ok=True)
    try_mutants(patterns)
    if FAILED.exists():
        print(f"these tests fail without any mistake:\n{FAILED.read_text()}")
        return 1
    equivalents = Equivalents.read(EQUIVALENTS)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    unnoticed: list[Mutant] = []
    for mutant in read_mutants(patterns):
        verdict = "equivalent" if mutant.verdict == "survived" and equivalents.reason(mutant) else mutant.verdict
        counts[part_of(mutant)][verdict] += 1
        unnoticed += [mutant] if verdict == "survived" else []
    console = Console(width=120, markup=False, highlight=False)
    for mutant in unnoticed:
        console.print(f"{mutant.name}\n{mutant.diff}\n")
    return show(console, counts)


def show(console: Console, counts: dict[str, Counter[str]]) -> int:
    """The table by part; 0 where each reaches the goal and nothing was left unchecked."""
    table = Table("part", "mistakes", "killed", "equivalent", "unnoticed", "not checked", "killed of the rest")
    failed = not counts
    for part, count in counts.items():
        real = count["killed"] + count["survived"]
        share = count["killed"] / max(real, 1)
        failed |= share < GOAL or count["not checked"] > 0
        cells = (count.total(), count["killed"], count["equivalent"], count["survived"], count["not checked"])
        table.add_row(part, *map(str, cells), f"{share:.1%}")
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
