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
    """Absolute names, without what is imported in functions or under conditions."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
