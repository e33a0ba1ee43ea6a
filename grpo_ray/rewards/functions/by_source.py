"""A recipe's own reward function as described by its source, for `check`, which runs none of it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import RewardFunction, inspect_function
from grpo_ray.rewards.functions.made import is_maker, no_call
from grpo_ray.rewards.functions.verl import is_verl, verl_function
from grpo_ray.user_code.functions import UserFunction


def described_by_source(config: RewardFunctionConfig, function: UserFunction) -> RewardFunction:
    """The result of `described`, as far as its parameters reveal it.

    Raises:
        RewardError: it does not take the `args`, has parameters that nothing fills, or is a class whose instances can't be called.
    """
    node, args = function.found.node, config.args
    if isinstance(node, ast.ClassDef):
        node, args = _call_of(config.name, node), {}
    if node is None:
        return RewardFunction(config.title, _never, config.weight, {})
    call = _with_parameters(node)
    if args is config.args and not isinstance(node, ast.AsyncFunctionDef) and is_maker(call, args):
        return RewardFunction(config.title, _never, config.weight, {})
    kind = verl_function if is_verl(call) else inspect_function
    return replace(kind(config.title, call, config.weight, args), call=_never)


def _call_of(name: str, node: ast.ClassDef) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The `__call__` of a class, without `self`. None if it is inherited."""
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name == "__call__":
            parameters = inner.args
            shorter = ast.arguments(
                posonlyargs=parameters.posonlyargs[1:],
                args=parameters.args if parameters.posonlyargs else parameters.args[1:],
                vararg=parameters.vararg,
                kwonlyargs=parameters.kwonlyargs,
                kw_defaults=parameters.kw_defaults,
                kwarg=parameters.kwarg,
                defaults=parameters.defaults,
            )
            return type(inner)(name=inner.name, args=shorter, body=[], decorator_list=[])
    if not node.bases:
        raise RewardError(no_call(name))
    return None


def _with_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Callable[..., Any]:
    """A function with these parameters, for inspection."""

    def shown(**_: Any) -> NoReturn:
        _never()

    shown.__signature__ = inspect.Signature(list(_parameters(node.args)))  # type: ignore[attr-defined]
    return shown


def _parameters(args: ast.arguments) -> list[inspect.Parameter]:
    kind = inspect.Parameter
    positional: list[tuple[ast.arg, Any]] = [(a, kind.POSITIONAL_ONLY) for a in args.posonlyargs]
    positional += [(a, kind.POSITIONAL_OR_KEYWORD) for a in args.args]
    first_default = len(positional) - len(args.defaults)
    out = [_parameter(a.arg, k, has_default=i >= first_default) for i, (a, k) in enumerate(positional)]
    if args.vararg is not None:
        out.append(_parameter(args.vararg.arg, kind.VAR_POSITIONAL))
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        out.append(_parameter(a.arg, kind.KEYWORD_ONLY, has_default=default is not None))
    if args.kwarg is not None:
        out.append(_parameter(args.kwarg.arg, kind.VAR_KEYWORD))
    return out


def _parameter(name: str, kind: Any, *, has_default: bool = False) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=None if has_default else inspect.Parameter.empty)


def _never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a reward that was not imported can't be called")
