"""What mutmut found, read from its files, and which of it changes nothing."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import libcst as cst
import yaml
from mutmut.mutation.diff_apply import get_diff_for_mutant, read_functions_from_index
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

    @cached_property
    def changes_prose(self) -> bool:
        """Whether it alters the case of a sentence in a `raise` or a warning, or puts XX around it, and nothing else."""
        functions = read_functions_from_index(self.name, self.path)
        if functions is None:
            return False
        was, becomes = (ast.parse(cst.Module([function]).code) for function in functions)
        changes = list(_changes(was, becomes, in_message=False))
        return len(changes) == 1 and all(_is_prose(*change) for change in changes)


Change = tuple[object, object, bool]
"""What was there, what is there now, and whether within an error or a warning."""


def _changes(was: object, becomes: object, in_message: bool) -> Iterator[Change]:
    if isinstance(was, ast.Constant) or type(was) is not type(becomes):
        was, becomes = (part.value if isinstance(part, ast.Constant) else part for part in (was, becomes))
        if was != becomes:
            yield was, becomes, in_message
    elif isinstance(was, ast.AST):
        in_message = in_message or _is_message(was)
        for name, part in ast.iter_fields(was):
            yield from _changes(part, getattr(becomes, name), in_message)
    elif isinstance(was, list) and isinstance(becomes, list) and len(was) == len(becomes):
        for one, other in zip(was, becomes, strict=True):
            yield from _changes(one, other, in_message)
    elif was != becomes:
        yield was, becomes, in_message


def _is_message(node: ast.AST) -> bool:
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(node, ast.Raise) or (isinstance(called, ast.Attribute) and called.attr in ("warn", "warning"))


def _is_prose(was: object, becomes: object, in_message: bool) -> bool:
    if not (in_message and isinstance(was, str) and isinstance(becomes, str) and " " in was.strip()):
        return False
    return becomes.replace("XX", "") == was or becomes.lower() == was.lower()


def read_mutants(patterns: Sequence[str] = ()) -> Iterator[Mutant]:
    """Every mutant under mutants/ whose name matches one of the patterns, all without any."""
    for meta in sorted(Path("mutants").rglob("*.py.meta")):
        path = meta.relative_to("mutants").with_suffix("")
        for name, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            if not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                yield Mutant(name, path, VERDICTS.get(status_by_exit_code[code], "not checked"))


def forget_gone() -> None:
    """mutmut keeps what it found in modules that have been renamed since, and no test knows them."""
    for meta in Path("mutants").rglob("*.py.meta"):
        copy = meta.with_suffix("")
        if not copy.relative_to("mutants").exists():
            meta.unlink()
            copy.unlink(missing_ok=True)


def forget_unnoticed() -> None:
    """mutmut tries again what nobody noticed: tests may be there now that it does not know."""
    for meta in Path("mutants").rglob("*.py.meta"):
        found = json.loads(meta.read_text())
        codes = found["exit_code_by_key"]
        found["exit_code_by_key"] = {
            name: code if VERDICTS.get(status_by_exit_code[code]) == "killed" else None for name, code in codes.items()
        }
        meta.write_text(json.dumps(found))


@dataclass(frozen=True)
class Equivalents:
    """Mistakes that change nothing that a test could see: single ones, and kinds by what they change."""

    single: dict[tuple[str, str, str], str]
    kinds: dict[str, str]
    prose: str

    @classmethod
    def read(cls, path: Path) -> Equivalents:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        single = {(entry["in"], entry["was"], entry["is"]): entry["because"] for entry in listed["single"]}
        return cls(single, {kind["only"]: kind["because"] for kind in listed["kinds"]}, listed["prose"])

    def reason(self, mutant: Mutant) -> str | None:
        """Why a mutant changes nothing, or None where it is a mistake."""
        if mutant.changes_prose:
            return self.prose
        was, becomes = mutant.lines("-"), mutant.lines("+")
        if reason := self.single.get((mutant.function, was, becomes)):
            return reason
        for kind, because in self.kinds.items():
            if _without(kind, was) == _without(kind, becomes):
                return because
        return None


def _without(kind: str, line: str) -> str:
    """A line without what a kind is about; an argument that is removed leaves the comma before it."""
    return re.sub(r",\s*(?=\))", "", re.sub(kind, "", line)).rstrip(" ,)")
