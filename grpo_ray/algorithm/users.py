"""A loss and an advantage of a recipe's own, `algorithm.loss: my_losses.mine`: found, looked at in their source, and loaded.

`check` reads recipes without torch, and so does this file; `users_called.py` has what calls them.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from typing import Any, Literal

from grpo_ray.algorithm.declare import Declared, declared_by, policy_loss
from grpo_ray.config.algorithm import TOKEN_ADVANTAGES, AlgorithmConfig
from grpo_ray.config.base import file_and_function, is_in_file, is_users
from grpo_ray.config.presets import SEQUENCE_LOSSES
from grpo_ray.errors import ConfigError
from grpo_ray.user_code.functions import UserFunction, of_module, of_path
from grpo_ray.user_code.places import ForeignCodeError

Option = Literal["loss", "advantage"]
_TAKES: dict[Option, tuple[str, ...]] = {"loss": ("inputs", "options"), "advantage": ("rewards",)}
CONTRACT: dict[Option, str] = {
    "loss": "a loss is a function (inputs: PolicyInputs, options: LossOptions) -> TokenLosses",
    "advantage": "an advantage is a function (rewards: Rewards) -> a tensor of their shape",
}
PAGE = "launch/guide/extend.md"


def users_functions(a: AlgorithmConfig) -> Iterator[tuple[Option, UserFunction]]:
    """The functions that a recipe names, not imported. Raises ConfigError: one does not exist, or a recipe must not name it."""
    for option in _TAKES:
        if is_users(name := getattr(a, option)):
            yield option, _found(option, name, a.package)


def check_users(a: AlgorithmConfig, *, imports: bool) -> None:
    """Check the loss and the advantage of a recipe's own.

    Args:
        imports: False: nothing of the recipe's own code is run, and only its source is read.

    Raises:
        ConfigError: a function does not exist, does not fit the contract, or excludes another option.
    """
    for option, function in users_functions(a):
        if imports:
            loaded(option, getattr(a, option), a.package)
        else:
            _check_source(option, getattr(a, option), function)
        if option == "loss":
            check_ratio(a, declared_loss(a).ratio if imports else _declared_by_source(function))


def has_sequence_ratio(a: AlgorithmConfig) -> bool:
    """Whether the ratio of the loss is that of the whole sequence."""
    return declared_loss(a).ratio == "sequence" if is_users(a.loss) else a.loss in SEQUENCE_LOSSES


def declared_loss(a: AlgorithmConfig) -> Declared:
    """What the recipe's own loss declares of itself; the loss is imported."""
    return declared_by(loaded("loss", a.loss, a.package))


def check_ratio(a: AlgorithmConfig, ratio: str) -> None:
    """Raise ConfigError for token-level options beside a ratio of the whole sequence."""
    if ratio != "sequence":
        return
    if a.advantage in TOKEN_ADVANTAGES:
        raise ConfigError(
            f"algorithm.advantage {a.advantage} gives every token its own advantage, and loss {a.loss} declares one ratio for the "
            "whole sequence; use another advantage, or a loss with a ratio by the token"
        )
    if (a.importance_sampling or "").startswith("token"):
        raise ConfigError(
            f"algorithm.importance_sampling {a.importance_sampling} weighs tokens one by one, but loss {a.loss} declares a ratio "
            "of the whole sequence; set algorithm.importance_sampling to sequence_truncate or sequence_mask"
        )


def _found(option: Option, name: str, package: str | None) -> UserFunction:
    try:
        return of_path(*file_and_function(name)) if is_in_file(name) else of_module(name, package)
    except ForeignCodeError as e:
        raise ConfigError(f"algorithm.{option} {name!r}: {e}") from None


@functools.cache
def loaded(option: Option, name: str, package: str | None) -> Any:
    """The function, imported once. Raises ConfigError: it can't be imported, or does not fit the contract."""
    found = _found(option, name, package)
    try:
        function = found.load()
    except ForeignCodeError as e:
        raise ConfigError(f"algorithm.{option} {name!r}: {e}") from e
    if isinstance(function, type) or inspect.iscoroutinefunction(function):
        raise _unfit(option, name, found, "it is a class or a coroutine")
    try:
        inspect.signature(function).bind(*_TAKES[option])
    except TypeError as e:
        raise _unfit(option, name, found, str(e)) from None
    return function


def _check_source(option: Option, name: str, function: UserFunction) -> None:
    """Raise ConfigError for a definition that can't be called as its option is; unknown decorators may change how it is called."""
    node = function.found.node
    if isinstance(node, ast.ClassDef | ast.AsyncFunctionDef):
        raise _unfit(option, name, function, "it is a class or a coroutine")
    if node is None or len(node.decorator_list) > len(list(_declarations(node))):
        return
    takes, args = _TAKES[option], node.args
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    needed = positional[: len(positional) - len(args.defaults)]
    needed += [a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    too_many = len(takes) > len(positional) and args.vararg is None
    if too_many or needed[len(takes) :] or any(a.arg in needed[: len(takes)] for a in args.kwonlyargs):
        raise _unfit(option, name, function, f"it takes ({ast.unparse(args)})")


def _declarations(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[ast.Call]:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call):
            called = decorator.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name == policy_loss.__name__:
                yield decorator


def _declared_by_source(function: UserFunction) -> str:
    """The ratio that the decorator names; `token` if the source does not state it."""
    for call in _declarations(function.found.node) if function.found.node is not None else ():
        for keyword in call.keywords:
            if keyword.arg == "ratio" and isinstance(keyword.value, ast.Constant):
                return str(keyword.value.value)
    return Declared.ratio


def _unfit(option: Option, name: str, function: UserFunction, why: str) -> ConfigError:
    found = function.found
    line = f", line {found.node.lineno}" if found.node is not None else ""
    return ConfigError(
        f"algorithm.{option} {name!r} ({found.source.file}{line}) can't be called with ({', '.join(_TAKES[option])}): {why}; "
        f"{CONTRACT[option]}, see {PAGE}"
    )
