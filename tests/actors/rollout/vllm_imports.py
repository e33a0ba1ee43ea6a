"""What the modules of vLLM's models import at their top, by their source: nothing is imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLLOWED = ("vllm.model_executor.models.", "vllm.transformers_utils.processors.", "transformers.models.")
TABLES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")


def classes() -> dict[str, str]:
    """The names of the classes that generate text -> their modules."""
    found: dict[str, str] = {}
    for node in ast.parse(_file("vllm.model_executor.models.registry").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in TABLES:
            found |= {name: f"{FOLLOWED[0]}{module}" for name, (module, _) in ast.literal_eval(node.value).items()}
    return found


@cache
def imports_torchvision(module: str) -> bool:
    if module.partition(".")[0] == "torchvision":
        return True
    path = _file(module) if module.startswith(FOLLOWED) else None
    return path is not None and path.is_file() and any(map(imports_torchvision, _imported(path, module)))


@cache
def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


def _file(module: str) -> Path:
    package, _, inside = module.partition(".")
    return _root(package) / f"{inside.replace('.', '/')}.py"


def _imported(path: Path, module: str) -> Iterator[str]:
    """Absolute names, without what is imported in functions or under conditions, of which pillow's presence is none."""
    for node in _statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
            yield from _defining(base, {alias.name for alias in node.names})


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) == "is_vision_available()":
            yield from _statements(node.body)


def _defining(base: str, names: set[str]) -> Iterator[str]:
    """The modules of these classes in a package of Transformers, which imports them when they are asked for."""
    if not base.startswith(FOLLOWED[2]):
        return
    for file in _file(base).with_suffix("").glob("*.py"):
        if any(isinstance(node, ast.ClassDef) and node.name in names for node in ast.parse(file.read_text()).body):
            yield f"{base}.{file.stem}"
