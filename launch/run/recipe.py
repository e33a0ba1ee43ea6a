"""The steps from a recipe's name and dotted overrides to a validated config."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from grpo_ray import json_text
from grpo_ray.config.data import DataConfig
from grpo_ray.config.loading import build, deep_merge, load_yaml, parse_overrides
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import DpoConfig, RewardModelConfig, SftConfig
from grpo_ray.config.typed import with_types
from grpo_ray.data.sources import MAX_LINE_BYTES
from grpo_ray.errors import ConfigError
from grpo_ray.names import check_name
from grpo_ray.plain_terminal import say
from grpo_ray.rewards.functions.files import with_absolute_files, with_shipped_files
from grpo_ray.secrets import hide_secrets
from grpo_ray.suggest import did_you_mean

RECIPES = Path(__file__).parents[1] / "recipes"
Config = TypeVar("Config", bound=RunConfig | SftConfig)
SCHEMAS: dict[str, type[RunConfig | SftConfig]] = {
    "grpo": RunConfig,
    "sft": SftConfig,
    "dpo": DpoConfig,
    "reward_model": RewardModelConfig,
}
SHIPPED = "grpo-ray-job.yaml"
"""The file name of a recipe that `submit` has resolved: paths of reward files are relative to the folder that was shipped, on
every node."""
COMMANDS = {"grpo": "train", "sft": "sft", "dpo": "dpo", "reward_model": "reward-model"}
"""The kind of a run -> the command that starts one."""


def recipe_names() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def find_recipe(recipe: str) -> Path:
    """The path of a YAML file, or of a recipe that ships with the project.

    Raises:
        ConfigError: it is neither; with "did you mean".
    """
    path = Path(recipe).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if path.is_dir():
            raise ConfigError(f"recipe {path} is a folder, and a file is meant")
        if not path.is_file():
            raise ConfigError(f"recipe file {path} does not exist")
        return path
    shipped = RECIPES / f"{recipe}.yaml"
    if shipped.is_file():
        return shipped
    names = recipe_names()
    hint = did_you_mean(recipe, names, then=f"shipped are {', '.join(names)}")
    raise ConfigError(f"there is no recipe {recipe!r}; {hint}; or give a .yaml file")


def with_own(own: list[str], overrides: list[str]) -> list[str]:
    """A command's own overrides, except for those that the user gives too, and the user's."""
    given = {item.partition("=")[0].strip() for item in overrides}
    return [item for item in own if item.partition("=")[0] not in given] + overrides


def tell_of_repeated(overrides: list[str]) -> None:
    keys = [item.partition("=")[0].strip() for item in overrides]
    last = dict(zip(keys, overrides, strict=True))
    for key in dict.fromkeys(k for k in keys if keys.count(k) > 1):
        say(hide_secrets(f"warning: {key} is given more than once; {last[key]} counts"), error=True)


def load_recipe(schema: type[Config], recipe: str, overrides: list[str], *, keep_home: bool = False) -> Config:
    """The validated config of a recipe with its overrides.

    Args:
        keep_home: leave `~` in paths unchanged, for another machine.

    Raises:
        ConfigError: the config is invalid; with every problem, one a line.
    """
    path = find_recipe(recipe)
    tell_of_repeated(overrides)
    data = deep_merge(load_yaml(path), parse_overrides(overrides))
    if is_pipeline(path):
        raise ConfigError(f"recipe {recipe} has stages: it is for `grpo-ray pipeline {recipe}`")
    source = f"recipe {recipe}" + (f" with {' '.join(overrides)}" if overrides else "")
    try:
        config = build(schema, data, source, keep_home=keep_home)
    except ConfigError as e:
        kind = kind_of(path, overrides)
        if SCHEMAS[kind] is schema:
            raise
        raise ConfigError(f"{e}\nBy its sections it is a recipe for `grpo-ray {COMMANDS[kind]}`") from None
    if keep_home:
        return with_shipped_files(config, path.parent, Path.cwd())
    return config if path.name == SHIPPED else with_absolute_files(config, path.parent)


def load_run_config(schema: type[Config], path: Path) -> Config:
    return build(schema, load_yaml(path), str(path))


def is_pipeline(path: Path) -> bool:
    return "stages" in load_yaml(path)


def kind_of(path: Path, overrides: Sequence[str] = ()) -> str:
    """The kind of a recipe or a config.yaml: by its section `dpo` or `reward_model`, also in an override; without these and
    without rewards or an environment it trains on demonstrations, or by `dpo` where its data are pairs."""
    sections = deep_merge(load_yaml(path), parse_overrides(list(overrides)))
    kinds = [kind for kind in ("dpo", "reward_model") if kind in sections]
    if kinds or "reward" in sections or "environment" in sections:
        return kinds[0] if kinds else "grpo"
    return "dpo" if _has_pairs(sections.get("data")) else "sft"


def check_kind(name: str) -> str:
    """The kind that a command's or a kind's name stands for. Raises ConfigError: there is none."""
    kinds = {**{command: kind for kind, command in COMMANDS.items()}, **{kind: kind for kind in COMMANDS}}
    if name not in kinds:
        raise ConfigError(f"there is no kind {name!r} of a run; there are {', '.join(COMMANDS.values())}")
    return kinds[name]


def _has_pairs(data: Any) -> bool:
    """Whether `data.train.columns`, or the first row of a file, names chosen and rejected completions."""
    data = with_types(DataConfig, data, {})
    source = data.get("train") if isinstance(data, dict) else None
    if not isinstance(source, dict):
        return False
    columns = source.get("columns")
    if isinstance(columns, dict) and {"chosen", "rejected"} <= set(columns):
        return True
    path = Path(str(source.get("path", ""))).expanduser()
    try:
        return {"chosen", "rejected"} <= set(_first_columns(path))
    except (OSError, ValueError):
        return False


def _first_columns(path: Path) -> Iterable[str]:
    """The columns of a file's first row; raises OSError or ValueError for what can't be read."""
    if path.suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            row = json_text.read(
                next((line for line in iter(lambda: file.readline(MAX_LINE_BYTES), b"") if line.strip()), b"{}")
            )
        return row if isinstance(row, dict) else ()
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_schema

        return list(read_schema(path).names)
    return ()


def run_folder(config: RunConfig | SftConfig, recipe: str) -> Path:
    name = config.name or f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(config.dir) / check_name(name)
