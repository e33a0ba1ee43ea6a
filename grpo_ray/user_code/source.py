"""What a user's file says about a name, read from its source: none of it is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grpo_ray.suggest import did_you_mean
from grpo_ray.user_code.modules import name_taken
from grpo_ray.user_code.places import ForeignCodeError, MissingCodeError, locate

MAX_STEPS = 20
"""The largest number of steps from module to module after an imported name."""
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """A module, given by its file."""

    file: Path
    module: str | None
    """The module's dotted name; None if it is named only by its file."""
    package: str | None
    """The installed package that the recipe names."""

    def __str__(self) -> str:
        return str(self.file) if self.module is None else f"module {self.module!r}"


@dataclass(frozen=True)
class Found:
    """The place where a function of a recipe is defined."""

    source: Source
    name: str
    node: Definition | None
    """The definition; None if it is the value of an expression, or if there is no source to read."""


def find(source: Source, name: str, steps: int = 0) -> Found:
    """The target of a module's name: a definition there, or in a module that it was imported from.

    Raises:
        ForeignCodeError: the module has no such name, or its target is one that a recipe may not name.
        SyntaxError: the file has one.
    """
    if steps > MAX_STEPS:
        raise ForeignCodeError(f"{name} of {source.file} leads from import to import without end")
    if source.file.suffix != ".py":
        return Found(source, name, None)
    tree = parse(source.file)
    found, missing = [], []
    for how in _bindings(tree.body, name):
        try:
            found.append(_follow(source, tree, name, how, steps))
        except MissingCodeError as e:
            missing.append(e)
    if not found and (starred := _starred(source, tree, name, steps)) is not None:
        return starred
    if not found:
        raise missing[0] if missing else MissingCodeError(_no_name(source, name))
    # If one branch defines it and another imports it, it is one of them.
    return next((f for f in found if f.node is None), found[-1])


def _no_name(source: Source, name: str) -> str:
    names = defined(source.file)
    hint = did_you_mean(name, names, f"it has {', '.join(names) or 'no functions'}", cutoff=0.5, show=repr)
    taken = None if source.module is None else name_taken(source.module)
    return f"{source} has no {name!r}" + (f": {taken}" if taken else f"; {hint}")


def parse(file: Path) -> ast.Module:
    """The syntax tree. Raises SyntaxError, also for a file that is no Python at all."""
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (ValueError, RecursionError, MemoryError) as e:
        raise SyntaxError(str(e) or type(e).__name__) from None


def defined(file: Path) -> list[str]:
    """The names of the functions and classes in it."""
    names = [node.name for node in _statements(parse(file).body) if isinstance(node, Definition)]
    return sorted({name for name in names if not name.startswith("_")})


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of the module itself, inside `if`, `try` and the like; not those of functions and classes."""
    for node in body:
        yield node
        if isinstance(node, Definition):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, field, []))
        for handler in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from _statements(handler.body)


def _bindings(body: list[ast.stmt], name: str) -> Iterator[ast.stmt | ast.alias]:
    for node in _statements(body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                if node.name == name:
                    yield node
            case ast.Import() | ast.ImportFrom():
                if any((a.asname or a.name.partition(".")[0]) == name for a in node.names):
                    yield node
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.For() | ast.With() | ast.Expr():
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
                if any(n.id == name for n in stored):
                    yield node


def _follow(source: Source, tree: ast.Module, name: str, how: ast.AST, steps: int) -> Found:
    match how:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return Found(source, name, how)
        case ast.Import():
            raise ForeignCodeError(f"{name!r} is a module that {source.file} imports, expected a function")
        case ast.ImportFrom():
            alias = next(a for a in how.names if (a.asname or a.name) == name)
            return _imported(source, _base(source, how), alias.name, steps)
        case ast.Assign(targets=[ast.Name()], value=value) | ast.AnnAssign(target=ast.Name(), value=value):
            return _value(source, tree, name, value, steps)
    return Found(source, name, None)


def _value(source: Source, tree: ast.Module, name: str, value: ast.expr | None, steps: int) -> Found:
    """The target of an assignment: `run = subprocess.run` leads to that function; of another expression, only its value would
    show."""
    match value:
        case ast.Name(id=other) if other != name:
            if any(True for _ in _bindings(tree.body, other)):
                return find(source, other, steps + 1)
            raise ForeignCodeError(f"{name!r} of {source.file} is Python's own {other}")
        case ast.Attribute(value=of, attr=attribute) if (module := _module_of(tree, of)) is not None:
            return _imported(source, module, attribute, steps)
    return Found(source, name, None)


def _module_of(tree: ast.Module, of: ast.expr) -> str | None:
    """The module that `a.b` is, where `a` was imported."""
    parts: list[str] = []
    while isinstance(of, ast.Attribute):
        parts.insert(0, of.attr)
        of = of.value
    if not isinstance(of, ast.Name):
        return None
    for node in _bindings(tree.body, of.id):
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == of.id)
            return ".".join([alias.name if alias.asname else of.id, *parts])
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            alias = next(a for a in node.names if (a.asname or a.name) == of.id)
            return ".".join([node.module, alias.name, *parts])
    return None


def _imported(source: Source, module: str, name: str, steps: int) -> Found:
    try:
        file = locate(module, source.package)
        return find(Source(file, module, source.package), name, steps + 1)
    except ForeignCodeError as e:
        raise type(e)(f"{name!r} is imported from {module} by {source.file}, and {e}") from None


def _base(source: Source, node: ast.ImportFrom) -> str:
    """The module that `from .x import y` means."""
    if not node.level:
        return node.module or ""
    if source.module is None:
        raise ForeignCodeError(
            f"{source.file} imports {'.' * node.level}{node.module or ''}, and is no module of a package"
        )
    parts = source.module.split(".")
    up = node.level - (source.file.name == "__init__.py")
    return ".".join([*(parts[: len(parts) - up]), *([node.module] if node.module else [])])


def _starred(source: Source, tree: ast.Module, name: str, steps: int) -> Found | None:
    for node in _statements(tree.body):
        if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
            try:
                return _imported(source, _base(source, node), name, steps)
            except MissingCodeError:
                continue
    return None
