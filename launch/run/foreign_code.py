"""A recipe's own code, which is not grpo-ray's: `check` names it, and runs none of it unless requested."""

from __future__ import annotations

from collections.abc import Iterator

from grpo_ray.algorithm.users import check_users, users_functions
from grpo_ray.config.data import DataSource
from grpo_ray.config.schema import RunConfig
from grpo_ray.config.supervised import SftConfig
from grpo_ray.data.sources import python_function
from grpo_ray.episodes.described import users_code
from grpo_ray.rewards.functions.by_path import users_function
from grpo_ray.rewards.table import BUILTINS

RUN_CODE = "--run-code"


def check_code(config: RunConfig | SftConfig, *, trains: bool = True) -> None:
    """Raise ConfigError, RewardError or DataError for a function that the config may not name, or a loss or an advantage that can't
    be called as its option is; nothing is run. A run's folder may be a stranger's.

    Args:
        trains: False: the loss and the advantage are not used, and need not exist.
    """
    if trains and isinstance(config, RunConfig):
        check_users(config.algorithm, imports=False)
    for _ in (*foreign_rewards(config), *foreign_environments(config), *foreign_rows(config)):
        pass


def foreign_algorithm(config: RunConfig | SftConfig) -> Iterator[str]:
    """A line for each of the recipe's own loss and advantage. Raises ConfigError: it does not exist, or must not be named."""
    if isinstance(config, RunConfig):
        for option, function in users_functions(config.algorithm):
            if function.foreign:
                yield f"algorithm.{option}: {function}"


def foreign_rewards(config: RunConfig | SftConfig) -> Iterator[str]:
    """A line for each reward of the recipe's own. Raises RewardError: it does not exist, or a recipe must not name it."""
    if isinstance(config, RunConfig):
        for reward in config.reward.functions:
            if reward.name not in BUILTINS and (function := users_function(reward)).foreign:
                yield f"reward {reward.title}: {function}"


def foreign_environments(config: RunConfig | SftConfig) -> Iterator[str]:
    """A line for each environment class and tool of the recipe's own. Raises RewardError, likewise."""
    if isinstance(config, RunConfig) and config.environment is not None:
        for option, function in users_code(config.environment):
            if function.foreign:
                yield f"{option}: {function}"


def foreign_rows(config: RunConfig | SftConfig) -> Iterator[str]:
    """A line for each data set made by a function of the recipe's own. Raises DataError, likewise."""
    for option, source in sources_of(config).items():
        function = python_function(source)
        if function is not None and function.foreign:
            yield f"{option}: {function}"


def sources_of(config: RunConfig | SftConfig) -> dict[str, DataSource]:
    """The data sets, by their options."""
    named = {f"data.eval.{name}" if name else "data.eval": source for name, source in config.data.eval_sets.items()}
    return {"data.train": config.data.train, **named}


def foreign_model(config: RunConfig | SftConfig) -> Iterator[str]:
    """A line, where the model may bring code of its own."""
    if config.model.trust_remote_code and config.model.path is not None:
        yield f"model.trust_remote_code: the Python files of {config.model.path}"
