"""The fields of a class of a package, read from its source: packages that take seconds to import are asked what they know."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from grpo_ray.errors import ConfigError
from grpo_ray.suggest import did_you_mean

_TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}
_SHOWN = 8


class Fields:
    """The fields of a class and its bases in one file, by name: the types of their values, as far as these are plain."""

    def __init__(self, path: Path, *names: str) -> None:
        """`names`: the class, and those of its bases that are in the same file."""
        self._folder = path
        self._tree = ast.parse(path.read_text(encoding="utf-8"))
        classes = [node for node in self._tree.body if isinstance(node, ast.ClassDef) and node.name in names]
        self._annotations = {name: node for one in classes for name, node in _annotated(one)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._annotations)

    def check(self, options: Mapping[str, Any], prefix: str, owner: str, *, whole_floats: bool = False) -> None:
        """Check options against the fields.

        Args:
            prefix: the dotted key of the options.
            owner: the class in words, for messages.
            whole_floats: the class takes 5e7 for an int.

        Raises:
            ConfigError: there is no such field, or its values are of another type.
        """
        for name, value in options.items():
            if name not in self._annotations:
                hint = did_you_mean(name, self._annotations, f"see the fields of {owner}")
                raise ConfigError(f"{prefix}.{name}: {owner} has no such option; {hint}")
            allowed = self._allowed(self._annotations[name])
            whole = whole_floats and isinstance(value, float) and value.is_integer()
            given = int(value) if whole else value
            if allowed is not None and not any(_is_of(given, one) for one in allowed):
                shown = ", ".join(one.__name__ if isinstance(one, type) else repr(one) for one in allowed[:_SHOWN])
                raise ConfigError(
                    f"{prefix}.{name}: {owner} takes {shown}{', ..' * (len(allowed) > _SHOWN)} there (got {value!r:.100})"
                )

    def _allowed(self, node: ast.expr) -> list[Any] | None:
        """The types and values of an annotation; None: any, since the annotation is not plain."""
        match node:
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                parts = [self._allowed(left), self._allowed(right)]
            case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
                parts = [self._allowed(inner), [None]]
            case ast.Subscript(value=ast.Name(id="Literal"), slice=ast.Tuple(elts=elts)):
                parts = [[e.value] if isinstance(e, ast.Constant) else None for e in elts]
            case ast.Constant(value=None):
                return [None]
            case ast.Name(id=name) if name in _TYPES:
                return list(_TYPES[name])
            case ast.Name(id=name):
                return self._alias(name)
            case _:
                return None
        return None if None in parts else [one for part in parts for one in part or ()]

    def _alias(self, name: str) -> list[Any] | None:
        """The values of a `Literal` that another file of the package names."""
        for node in self._tree.body:
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                path = _module_file(node.module or "")
                if path is not None:
                    return Fields(path)._assigned(name)
        return None

    def _assigned(self, name: str) -> list[Any] | None:
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return self._allowed(node.value)
        return None


@cache
def fields_of(package: str, module: str, *names: str) -> Fields | None:
    """The fields of classes in a module of a package; None if the package is not installed here."""
    path = _module_file(f"{package}.{module}")
    return None if path is None else Fields(path, *names)


def _module_file(module: str) -> Path | None:
    package, *parts = module.split(".")
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:
        return None
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in (Path(folder, *parts).with_suffix(".py"), Path(folder, *parts, "__init__.py")):
            if path.is_file():
                return path
    return None


def _annotated(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    """Fields and their annotations, under their alias too (pydantic's `Field(.., alias="name")`)."""
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id[0] != "_":
            yield line.target.id, line.annotation
            keywords = line.value.keywords if isinstance(line.value, ast.Call) else []
            for keyword in keywords:
                if keyword.arg == "alias" and isinstance(keyword.value, ast.Constant):
                    yield str(keyword.value.value), line.annotation


def _is_of(value: Any, one: Any) -> bool:
    if not isinstance(one, type):
        return bool(value == one)
    return isinstance(value, one) and (one is bool or not isinstance(value, bool))
