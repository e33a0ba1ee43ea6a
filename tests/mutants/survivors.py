"""What mutmut found, read from its files, and which of it changes nothing."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

VERDICTS = {
    "killed": "killed",
    "timeout": "killed",
    "segfault": "killed",
    "survived": "survived",
    "no tests": "survived",
}
"""mutmut's statuses; one that a test would end by its time limit was noticed. Everything else was not checked."""


@dataclass(frozen=True)
class Mutant:
    """One mistake in one function, as mutmut names it, and what the tests said to it."""

    name: str
    path: Path
    verdict: str

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def function(self) -> str:
        """`module.function`, or `module.Class.method`."""
        mangled = self.name.rpartition(".")[2].rpartition("__mutmut_")[0]
        return f"{self.module}.{mangled.removeprefix('x_').replace('xǁ', '').replace('ǁ', '.')}"

    @cached_property
    def diff(self) -> str:
        return str(get_diff_for_mutant(self.name, path=self.path))

    def lines(self, sign: str) -> str:
        """The lines taken away (`-`) or put in their place (`+`), without indentation."""
        changed = [
            line[1:] for line in self.diff.splitlines() if line.startswith(sign) and not line.startswith(sign * 3)
        ]
        return "\n".join(line.strip() for line in changed)

    @property
    def in_message(self) -> bool:
        """Whether the mistake lies inside a `raise`: it changes the words of an error, or which error ends what ends anyway."""
        body = [line for line in self.diff.splitlines() if line[:1] in (" ", "-") and not line.startswith("---")]
        try:
            tree = ast.parse(textwrap.dedent("\n".join(line[1:] for line in body)))
        except SyntaxError:
            return False
        changed = {number for number, line in enumerate(body, 1) if line.startswith("-")}
        spans = [
            range(node.lineno, (node.end_lineno or 0) + 1) for node in ast.walk(tree) if isinstance(node, ast.Raise)
        ]
        return bool(changed) and all(any(number in span for span in spans) for number in changed)


def read_mutants(patterns: Sequence[str] = ()) -> Iterator[Mutant]:
    """Every mutant under mutants/ whose name matches one of the patterns, all without any."""
    for meta in sorted(Path("mutants").rglob("*.py.meta")):
        path = meta.relative_to("mutants").with_suffix("")
        for name, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                yield Mutant(name, path, VERDICTS.get(status_by_exit_code[code], "not checked"))


@dataclass(frozen=True)
class Equivalents:
    """Mistakes that change nothing that a test could see: single ones, and kinds by what they change."""

    single: dict[tuple[str, str, str], str]
    kinds: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> Equivalents:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        single = {(entry["in"], entry["was"], entry["is"]): entry["because"] for entry in listed["single"]}
        return cls(single, {kind["only"]: kind["because"] for kind in listed["kinds"]})

    def reason(self, mutant: Mutant) -> str | None:
        """Why a mutant changes nothing, or None where it is a mistake."""
        if mutant.in_message:
            return "the words of an error"
        was, becomes = mutant.lines("-"), mutant.lines("+")
        if reason := self.single.get((mutant.function, was, becomes)):
            return reason
        for kind, because in self.kinds.items():
            if _without(kind, was) == _without(kind, becomes):
                return because
        return None


def _without(kind: str, line: str) -> str:
    """A line without what a kind is about; an argument that is removed leaves the comma before it."""
    return re.sub(kind, "", line).rstrip(" ,)")
