"""What a sample is worth. One file per reward; `BUILTINS` is the list that recipes choose from by name."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grpo_ray.config_reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards import golds
from grpo_ray.rewards.accuracy import accuracy, load_parser
from grpo_ray.rewards.by_path import load_from_file
from grpo_ray.rewards.code import check_code, code
from grpo_ray.rewards.countdown import countdown
from grpo_ray.rewards.exact_match import exact_match
from grpo_ray.rewards.function import Columns, RewardFunction, ScoreInputs, inspect_function
from grpo_ray.rewards.instruction_checks import load_libraries
from grpo_ray.rewards.instructions import instructions
from grpo_ray.rewards.judge import judge
from grpo_ray.rewards.language_consistency import check_languages, language_consistency, load_dictionaries
from grpo_ray.rewards.made import made
from grpo_ray.rewards.r1_format import r1_format
from grpo_ray.rewards.reasoning_gym_task import check_reasoning_gym, load_verifier, reasoning_gym
from grpo_ray.rewards.repetition_penalty import repetition_penalty
from grpo_ray.rewards.reward_model import check_reward_model, load_reward_model, reward_model
from grpo_ray.rewards.scoring import call_reward, score_samples, weighted_sum
from grpo_ray.rewards.soft_overlong import soft_overlong
from grpo_ray.rewards.think_format import think_format
from grpo_ray.rewards.verl import is_verl, verl_function
from grpo_ray.user_modules import name_taken

__all__ = ["BUILTINS", "RewardFunction", "ScoreInputs", "call_reward", "resolve", "score_samples", "weighted_sum"]

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
"""What each takes from the data. All other parameters are options, which come from `args` alone."""


def columns_of(name: str, args: dict[str, Any]) -> Columns:
    """The columns that a built-in takes from the data under these options.

    Raises:
        RewardError: `args` hold what only the data can say.
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


# Imported where samples are scored when the function is resolved: at the first sample it would count against its deadline.
_LIBRARIES = {"accuracy": "math_verify", "judge": "openai"}
# What has to be there besides, given `args`.
_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "code": check_code,
    "language_consistency": check_languages,
    "reasoning_gym": check_reasoning_gym,
    "reward_model": check_reward_model,
}
# What is read before the first sample, where it is scored.
_LOADS: dict[str, Callable[[dict[str, Any]], None]] = {
    "accuracy": load_parser,
    "instructions": load_libraries,
    "language_consistency": load_dictionaries,
    "reasoning_gym": load_verifier,
    "reward_model": load_reward_model,
}


def resolve(config: RewardFunctionConfig, *, load: bool = False) -> RewardFunction:
    """Find the function that a recipe names: a built-in, `package.module.function`, the current folder included, or
    `file.py:function`.

    `load`: also read what it works with (a model, dictionaries), which takes seconds and memory.

    Raises:
        RewardError: it does not exist, can't be imported, does not take the `args` given, or lacks what it needs.
    """
    if config.name in _CHECKS:
        _CHECKS[config.name](config.args)
    function = described(config)
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


def described(config: RewardFunctionConfig) -> RewardFunction:
    """As `resolve`, without a look at what it needs besides: programs, models, libraries."""
    call = BUILTINS.get(config.name)
    if call is not None:
        declared = columns_of(config.name, config.args)
        function = inspect_function(config.title, call, config.weight, config.args, declared)
    else:
        function = _users(config, _find(config))
    built_in = config.name in BUILTINS
    return replace(function, sources=config.sources, from_step=config.from_step, part=config.part, built_in=built_in)


def _users(config: RewardFunctionConfig, found: Callable[..., Any]) -> RewardFunction:
    call, args = made(config.name, found, config.args)
    kind = verl_function if is_verl(call) else inspect_function
    return kind(config.title, call, config.weight, args)


def _find(config: RewardFunctionConfig) -> Callable[..., Any]:
    if config.in_file:
        return load_from_file(config.name)
    return _import(config.name) if "." in config.name else _unknown(config.name)


def _unknown(name: str) -> Callable[..., Any]:
    close = difflib.get_close_matches(name, BUILTINS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"built in: {', '.join(BUILTINS)};"
    raise RewardError(
        f"no reward is called {name!r}; {hint} A function of yours is named package.module.function or file.py:function"
    )


def _import(path: str) -> Callable[..., Any]:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as e:
        if e.name is not None and (taken := name_taken(e.name)) is not None:
            raise RewardError(f"reward {path!r}: there is no module {e.name!r}: {taken}") from None
        if e.name is not None and (module_name == e.name or module_name.startswith(f"{e.name}.")):
            raise RewardError(
                f"reward {path!r}: there is no module {e.name!r} in {os.getcwd()} or on PYTHONPATH; start the run from "
                "the folder that holds it, or install it"
            ) from None
        raise RewardError(
            f"reward {path!r}: its module {module_name!r} imports {e.name!r}, which is not installed"
        ) from e
    except (Exception, SystemExit) as e:
        first_line = (str(e).splitlines() or [""])[0]
        taken = name_taken(e.name) if isinstance(e, ImportError) and e.name is not None else None
        raise RewardError(
            f"reward {path!r}: importing {module_name!r} failed with {type(e).__name__}: {first_line}"
            + (f"; {taken}" if taken is not None else "")
        ) from e
    try:
        found = getattr(module, attribute)
    except AttributeError:
        if (taken := name_taken(module_name)) is not None:
            raise RewardError(f"reward {path!r}: module {module_name!r} has no {attribute!r}: {taken}") from None
        names = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
        close = difflib.get_close_matches(attribute, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(sorted(names)) or 'no functions'}"
        raise RewardError(f"reward {path!r}: module {module_name!r} has no {attribute!r}; {hint}") from None
    if not callable(found):
        raise RewardError(f"reward {path!r} is a {type(found).__name__}, expected a function")
    return found
