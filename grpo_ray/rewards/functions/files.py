"""Where the files of functions are that a recipe names (`rewards.py:mine`): of rewards, of a loss, of an advantage.

In a run's own config and in its config.yaml a path is absolute, so that workers and later commands find the file from any folder.
In a submitted run it stays relative to the shipped folder, which is the working folder of every worker.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from grpo_ray.config.base import file_and_function, in_other_place, is_in_file
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.errors import ConfigError

C = TypeVar("C", bound=RunConfig | SftConfig)


def with_absolute_files(config: C, folder: Path) -> C:
    """The config, with the file of every function named by its absolute path.

    Args:
        config: the config of a recipe.
        folder: the folder of the recipe; a relative path is searched there, then in the current folder.

    Raises:
        ConfigError: there is no such file.
    """

    def absolute(what: str, path: str) -> str:
        places = [place for place in (folder / path, Path(path)) if place.is_file()]
        if not places:
            raise ConfigError(f"{what}: there is no file {path}{_looked(path, folder, Path.cwd())}")
        return str(places[0].resolve())

    return _with_files(config, absolute)


def with_shipped_files(config: C, folder: Path, shipped: Path) -> C:
    """The config of a run that is submitted: the file of every function by its path in the folder that is shipped.

    Args:
        config: the config of a recipe, `~` not expanded.
        folder: the folder of the recipe.
        shipped: the folder that is shipped.

    Raises:
        ConfigError: there is no such file, or it lies elsewhere, and so would not reach the nodes.
    """

    def inside(what: str, path: str) -> str:
        places = [p for p in (folder / Path(path).expanduser(), Path(path).expanduser()) if p.is_file()]
        if not places:
            raise ConfigError(f"{what}: there is no file {path}{_looked(path, folder, shipped)}")
        file = places[0].resolve()
        if not file.is_relative_to(shipped.resolve()):
            raise ConfigError(
                f"{what}: {file} is outside of {shipped}, the folder that is shipped, and would not reach the cluster's "
                "nodes; move it there, or submit from a folder that holds it"
            )
        relative = file.relative_to(shipped.resolve())
        if any(part.startswith(".") for part in relative.parts):
            raise ConfigError(f"{what}: {relative} is hidden, and hidden files are not shipped; rename it")
        return str(relative)

    return _with_files(config, inside)


def _with_files(config: C, place: Callable[[str, str], str]) -> C:
    if not isinstance(config, RunConfig):
        return config

    def placed(name: str, what: str) -> str:
        return in_other_place(name, place(f"{what} {name!r}", file_and_function(name)[0])) if is_in_file(name) else name

    functions = tuple(f.model_copy(update={"name": placed(f.name, "reward")}) for f in config.reward.functions)
    environment = config.environment and config.environment.with_names(lambda name: placed(name, "environment"))
    a = config.algorithm
    users = {option: placed(getattr(a, option), f"algorithm.{option}") for option in ("loss", "advantage")}
    return config.model_copy(
        update={
            "reward": config.reward.model_copy(update={"functions": functions}),
            "environment": environment,
            "algorithm": a.model_copy(update=users),
        }
    )


def _looked(path: str, *folders: Path) -> str:
    """The places where a relative path was searched."""
    if Path(path).is_absolute():
        return ""
    return " in " + " or in ".join(dict.fromkeys(str(folder.resolve()) for folder in folders))
