"""A config with every path made absolute, so that what a run records is right from any folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import AfterValidator

from grpo_ray.config.algorithm import AlgorithmConfig
from grpo_ray.config.base import Strict, expand_home, file_and_function, in_other_place, is_in_file
from grpo_ray.config.data import DataSource
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig

Config = TypeVar("Config", RunConfig, SftConfig, RunConfig | SftConfig)
S = TypeVar("S", bound=Strict)
MAY_BE_NAMES = ("path", "template")
"""Options that take a name as well as a path: the value is a path if such a file exists, or if it looks like a path."""
REWARD_ARGS = ("path", "cache")
"""The `args` of built-in rewards that are paths: a model's, and a file of answers."""
_FILES = (".jsonl", ".ndjson", ".parquet", ".json", ".jinja", ".jinja2", ".txt", ".py")
_WORDS = ("chat", "raw", "r1", "r1_zero")


def with_places(config: Config, folder: Path) -> Config:
    """The config with every path made absolute.

    Args:
        folder: the base of relative paths, and the folder in which modules of rewards and data were searched.
    """
    out = _absolute(config, folder)
    return out if config.code_dir is not None else out.model_copy(update={"code_dir": str(folder)})


def path_options(schema: type[Strict]) -> Iterator[str]:
    """The names of the fields of this section that are paths."""
    return (name for name, field in schema.model_fields.items() if _is_path(field.annotation, field.metadata))


def _is_path(annotation: Any, metadata: Any) -> bool:
    if any(isinstance(m, AfterValidator) and m.func is expand_home for m in metadata):
        return True
    return any(_is_path(arg, getattr(arg, "__metadata__", ())) for arg in get_args(annotation))


def _absolute(section: S, folder: Path) -> S:
    update: dict[str, Any] = {}
    paths = set(path_options(type(section)))
    for name in type(section).model_fields:
        value = getattr(section, name)
        if name in paths and isinstance(value, str):
            update[name] = _place(value, folder, named=name in MAY_BE_NAMES and not _is_output(section, name))
        else:
            update[name] = _below(value, folder)
    if isinstance(section, DataSource) and section.is_generator:
        del update["path"]
    if isinstance(section, RewardFunctionConfig):
        update["name"] = _code_file(section.name, folder)
        update["args"] = {k: _reward_place(k, v, folder) for k, v in section.args.items()}
    if isinstance(section, AlgorithmConfig):
        update["loss"], update["advantage"] = _code_file(section.loss, folder), _code_file(section.advantage, folder)
    if isinstance(section, EnvironmentConfig):
        users = section.with_names(lambda name: _code_file(name, folder))
        update |= {"name": users.name, "classes": users.classes, "tools": users.tools}
    return section.model_copy(update=update)


def _code_file(name: str, folder: Path) -> str:
    """The name of a function, with its file as an absolute path; a dotted name is looked for in `code_dir`."""
    if not is_in_file(name):
        return name
    return in_other_place(name, _place(file_and_function(name)[0], folder, named=False))


def _reward_place(name: str, value: Any, folder: Path) -> Any:
    return _place(value, folder, named=name == "path") if name in REWARD_ARGS and isinstance(value, str) else value


def _is_output(section: Strict, name: str) -> bool:
    """Whether the option is an output path, which may not exist yet."""
    return type(section).__name__ == "CheckpointConfig" and name == "path"


def _below(value: Any, folder: Path) -> Any:
    match value:
        case Strict():
            return _absolute(value, folder)
        case dict():
            return {k: _below(v, folder) if isinstance(v, Strict) else v for k, v in value.items()}
        case tuple():
            return tuple(_below(v, folder) for v in value)
    return value


def _place(value: str, folder: Path, *, named: bool) -> str:
    """The absolute path, links not resolved: the link to a run's newest model leads to another folder tomorrow."""
    if "://" in value or value.startswith("~") or Path(value).is_absolute():
        return value
    here = os.path.abspath(folder / value)
    if named and value in _WORDS:
        return value
    looks = value.startswith(("./", "../")) or value in (".", "..") or value.endswith(_FILES)
    return here if not named or looks or os.path.exists(here) else value
