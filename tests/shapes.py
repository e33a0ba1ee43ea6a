"""The shapes that annotations state, `Float[Tensor, "P G"]`, checked at each call in tests. A run evaluates no annotation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

CHECKED = ("grpo_ray.algorithm", "grpo_ray.batch", "grpo_ray.models.logprobs")
WORDS = {word: getattr(jaxtyping, word) for word in ("Bool", "Float", "Int", "Shaped")}
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked; an int is a float too, as for a static type checker."""
    return _check(function)


@contextmanager
def unchecked() -> Iterator[None]:
    """As in a run, where nothing but the product itself looks at what a recipe's own code gives."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def check_shapes() -> None:
    """Check these modules when they are imported from here on; what they import for a static type checker alone, they have."""
    hook: Any = jaxtyping.install_import_hook(CHECKED, "tests.shapes.check").hook
    find = hook.find_spec

    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec: ModuleSpec | None = find(name, path, target)
        if spec is not None:
            loader: Any = spec.loader
            loader.exec_module = _with_words(loader.exec_module)
        return spec

    hook.find_spec = find_spec


def _with_words(execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        vars(module).update(WORDS)
        execute(module)

    return exec_module
