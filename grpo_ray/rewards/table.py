"""The table of built-in rewards, and the lookup of a recipe's reward function."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo_ray.config.base import HOW_TO_NAME
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.accuracy import accuracy, load_parser
from grpo_ray.rewards.answers import golds
from grpo_ray.rewards.code import check_code, code
from grpo_ray.rewards.countdown import countdown
from grpo_ray.rewards.exact_match import exact_match
from grpo_ray.rewards.functions.by_path import users_function
from grpo_ray.rewards.functions.by_source import described_by_source
from grpo_ray.rewards.functions.function import Columns, RewardFunction, inspect_function
from grpo_ray.rewards.functions.made import made
from grpo_ray.rewards.functions.verl import is_verl, verl_function
from grpo_ray.rewards.instruction_checks import load_libraries
from grpo_ray.rewards.instructions import instructions
from grpo_ray.rewards.judge import judge
from grpo_ray.rewards.language_consistency import check_languages, language_consistency, load_dictionaries
from grpo_ray.rewards.r1_format import r1_format
from grpo_ray.rewards.reasoning_gym_task import check_reasoning_gym, load_verifier, reasoning_gym
from grpo_ray.rewards.repetition_penalty import repetition_penalty
from grpo_ray.rewards.reward_model import check_reward_model, load_reward_model, reward_model
from grpo_ray.rewards.soft_overlong import soft_overlong
from grpo_ray.rewards.think_format import think_format
from grpo_ray.suggest import did_you_mean
from grpo_ray.user_code.places import ForeignCodeError

BUILTINS: dict[str, Callable[..., Any]] = {
    "accuracy": accuracy,
    "think_format": think_format,
    "r1_format": r1_format,
    "code": code,
    "countdown": countdown,
    "reasoning_gym": reasoning_gym,
    "soft_overlong": soft_overlong,
    "repetition_penalty": repetition_penalty,
    "exact_match": exact_match,
    "language_consistency": language_consistency,
    "instructions": instructions,
    "reward_model": reward_model,
    "judge": judge,
}
_ANSWER = Columns(required=(("answer",),))
_COLUMNS: dict[str, Columns] = {
    "accuracy": Columns(required=(golds.COLUMNS,)),
    "code": Columns(required=(("tests",),), optional=("entry_point",)),
    "countdown": Columns(required=(("target",), ("nums",))),
    "reasoning_gym": Columns(required=(("reasoning_gym_entry",), ("reasoning_gym_task",))),
    "exact_match": _ANSWER,
    "language_consistency": Columns(required=(("language",),)),
    "instructions": Columns(required=(("instruction_id_list",), ("kwargs",))),
}
"""The columns that each takes from the data. All other parameters are options, which come only from `args`."""


def columns_of(name: str, args: dict[str, Any]) -> Columns:
    """The columns that a built-in takes from the data under these options.

    Raises:
        RewardError: `args` hold what only the data can provide.
    """
    if name == "judge":
        return _ANSWER if args.get("use_answer") else Columns()
    if name == "language_consistency" and "language" in args:
        return Columns()
    columns = _COLUMNS.get(name, Columns())
    taken = next((k for k in args if k in columns.names), None)
    if taken is not None:
        raise RewardError(
            f"reward {name!r} takes {taken!r} from the data, a value for each row, and not from args; map a column to it: "
            f"data.train.columns: {{{taken}: NAME}}"
        )
    return columns


# Imported by the scoring process when the function is resolved: at the first sample it would count against its
# deadline.
_LIBRARIES = {"accuracy": "math_verify", "judge": "openai"}
# Checks of further requirements, given `args`.
_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "code": check_code,
    "language_consistency": check_languages,
    "reasoning_gym": check_reasoning_gym,
    "reward_model": check_reward_model,
}
# What the scoring process reads before the first sample.
_LOADS: dict[str, Callable[[dict[str, Any]], None]] = {
    "accuracy": load_parser,
    "instructions": load_libraries,
    "language_consistency": load_dictionaries,
    "reasoning_gym": load_verifier,
    "reward_model": load_reward_model,
}


def resolve(config: RewardFunctionConfig, *, load: bool = False, imports: bool = True) -> RewardFunction:
    """The function that a recipe names: a built-in, `package.module.function`, the current folder included, or `file.py:function`.

    Args:
        load: whether to read its resources too (a model, dictionaries), which takes seconds and memory.
        imports: as in `described`.

    Raises:
        RewardError: it does not exist, can't be imported, does not take the `args` given, or lacks what it needs.
    """
    if config.name in _CHECKS:
        _CHECKS[config.name](config.args)
    function = described(config, imports=imports)
    if config.part != "all" and function.accepts is not None and "completions" not in function.accepts:
        raise RewardError(
            f"reward {config.title!r}: part: {config.part} has no effect, for it reads no text: completion_ids are the tokens of "
            "the whole completion; remove part"
        )
    library = _LIBRARIES.get(config.name)
    if library is not None and importlib.util.find_spec(library) is None:
        raise RewardError(f"reward {config.title!r} needs the package {library}, which is not installed")
    if load and library is not None:
        importlib.import_module(library)
    if load and config.name in _LOADS:
        _LOADS[config.name](config.args)
    return function


def described(config: RewardFunctionConfig, *, imports: bool = True) -> RewardFunction:
    """The function as from `resolve`, without checking its further requirements: programs, models, libraries.

    Args:
        imports: False: none of the recipe's own code is run, and only its source is known.
    """
    call = BUILTINS.get(config.name)
    if call is not None:
        declared = columns_of(config.name, config.args)
        function = inspect_function(config.title, call, config.weight, config.args, declared)
    else:
        function = _users(config, imports=imports)
    built_in = config.name in BUILTINS
    return replace(function, sources=config.sources, from_step=config.from_step, part=config.part, built_in=built_in)


def _users(config: RewardFunctionConfig, *, imports: bool) -> RewardFunction:
    if "." not in config.name:
        raise RewardError(_unknown(config.name))
    function = users_function(config)
    if not imports and function.foreign:
        return described_by_source(config, function)
    try:
        found = function.load()
    except ForeignCodeError as e:
        raise RewardError(f"reward {config.name!r}: {e}") from e
    call, args = made(config.name, found, config.args)
    kind = verl_function if is_verl(call) else inspect_function
    return kind(config.title, call, config.weight, args)


def _unknown(name: str) -> str:
    hint = did_you_mean(name, BUILTINS, f"built in: {', '.join(BUILTINS)};", cutoff=0.5, show=repr)
    return f"no reward is called {name!r}; {hint} {HOW_TO_NAME}"
