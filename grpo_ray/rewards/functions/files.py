"""The files of rewards that a recipe names (`rewards.py:mine`).

In a run's own config and in its config.yaml a path is absolute, so that workers and later commands find the file from any folder.
In a submitted run it stays relative to the shipped folder, which is the working folder of every worker.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from grpo_ray.config.reward import file_and_function
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError

C = TypeVar("C", bound=RunConfig | SftConfig)


def with_absolute_files(config: C, folder: Path) -> C:
    """The config, with every reward's file named by its absolute path.

    Args:
        config: the config of a recipe.
        folder: the folder of the recipe; a relative path is searched there, then in the current folder.

    Raises:
        ConfigError: there is no such file.
    """

    def absolute(name: str, path: str) -> str:
        places = [place for place in (folder / path, Path(path)) if place.is_file()]
        if not places:
            raise ConfigError(f"reward {name!r}: there is no file {path}{_looked(path, folder, Path.cwd())}")
        return str(places[0].resolve())

    return _with_files(config, absolute)


def with_shipped_files(config: C, folder: Path, shipped: Path) -> C:
    """The config of a submitted run: every reward's file by its path in the shipped folder.

    Args:
        config: the config of a recipe, `~` not expanded.
        folder: the folder of the recipe.
        shipped: the folder that is shipped.

    Raises:
        ConfigError: there is no such file, or it lies elsewhere, and so would not reach the nodes.
    """

    def inside(name: str, path: str) -> str:
        places = [p for p in (folder / Path(path).expanduser(), Path(path).expanduser()) if p.is_file()]
        if not places:
            raise ConfigError(f"reward {name!r}: there is no file {path}{_looked(path, folder, shipped)}")
        file = places[0].resolve()
        if not file.is_relative_to(shipped.resolve()):
            raise ConfigError(
                f"reward {name!r}: {file} is outside of {shipped}, the folder that is shipped, and would not reach the cluster's "
                "nodes; move it there, or submit from a folder that holds it"
            )
        relative = file.relative_to(shipped.resolve())
        if any(part.startswith(".") for part in relative.parts):
            raise ConfigError(f"reward {name!r}: {relative} is hidden, and hidden files are not shipped; rename it")
        return str(relative)

    return _with_files(config, inside)


def _with_files(config: C, place: Callable[[str, str], str]) -> C:
    if not isinstance(config, RunConfig):
        return config
    functions = []
    for function in config.reward.functions:
        if function.in_file:
            path, attribute = file_and_function(function.name)
            named = f"{place(function.name, path)}:{attribute}" if attribute else place(function.name, path)
            functions.append(function.model_copy(update={"name": named}))
        else:
            functions.append(function)
    reward = config.reward.model_copy(update={"functions": tuple(functions)})
    return config.model_copy(update={"reward": reward})


def _looked(path: str, *folders: Path) -> str:
    """The places where a relative path was searched."""
    if Path(path).is_absolute():
        return ""
    return " in " + " or in ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
